"""`shoal bench quantize`: what each method costs in quality, and what quantising and loading take.

Quality on trained models: the shipped one, and a real checkpoint in `shared/models` beside the checkout where there is
one. The engine runs original and quantised in float32 on the same held-out prompts; nothing but the weights differs.
Files are checked by a decoder of this file that shares no code with the product, and by transformers. Time and memory:
a random Llama shape of 135 million weights, each in a process of its own.

`python -m jobs.bench.quantize RECORD.json README.md` writes a kept record's table between the README's markers.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file

from actors.config import EngineConfig
from actors.engine import Engine
from actors.quality import Quality, compare, measure_reference, summarise
from actors.quantizers.layer_rounding import METHODS
from actors.quantizers.layer_walk import walk
from actors.quantizers.run import QuantizeSettings, quantize
from actors.quantizers.sensitivity import Part, bytes_for_bits, choose_bits, measure_sensitivity
from actors.requests import SamplingParams
from actors.weights.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from jobs.bench.engine import SHAPE
from jobs.bench.result import Bar, BenchResult, paste_between
from jobs.demo.evaluate import encode_prefix, encode_tickets
from jobs.demo.tickets import make_tickets

DEMO = Path(__file__).parents[1] / "demo" / "model"
SHARED_MODELS = Path(__file__).parents[3] / "shared" / "models"
CALIBRATION_SEED = 777
JUDGE_SEED = 606_060
"""Of the tickets and stories that judge; no setting of a method was chosen by them."""

NUM_CALIBRATION, NUM_HELD_OUT = 128, 400
MIXED = "gptq, bits by sensitivity"
MAX_RATIO = 0.7
MAX_POINTS_LOST = 1.0
MAX_LOGIT_ERROR = 1e-2
MAX_LOAD_MEMORY = 1.15
MARKERS = ("<!-- quality: written by jobs.bench.quantize -->", "<!-- /quality -->")

SHAPE_GROUP_SIZE = 64
"""The largest that divides 576."""

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Case:
    """A trained model with prompts. gold: the right answers to `held_out`, as text, where there are any."""

    name: str
    model: Path
    group_size: int
    calibration: Prompts
    held_out: Prompts
    max_tokens: int
    gold: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one model: a row of the table. exact: share of right answers (gold) or None."""

    model: str
    method: str
    bits_per_weight: float
    quality: Quality
    exact: float | None
    logit_error: float
    is_bit_equal: bool


def bench_quantize() -> BenchResult:
    """Check, then measure; about ten minutes on two cores."""
    console = Console(stderr=True)
    bars: list[Bar] = []
    table: list[dict[str, Any]] = []
    is_correct = True
    with tempfile.TemporaryDirectory() as folder:
        for case in [demo_case(), *real_cases()]:
            rows, exact = measure_case(case, Path(folder), console)
            is_correct &= all(row.is_bit_equal and row.logit_error <= MAX_LOGIT_ERROR for row in rows)
            bars += case_bars(case, rows, exact)
            table += [table_row(row, exact) for row in rows]
        bars += cost_bars(Path(folder), console)
    console.print(markdown(table))
    config = {"quality": table, "shape": SHAPE, "calibration_rows": NUM_CALIBRATION, "held_out_rows": NUM_HELD_OUT}
    return BenchResult("quantize", is_correct, bars, config)


def demo_case() -> Case:
    """The shipped model: tickets with their gold answers to calibrate on, others to judge by."""
    tokenizer = load_tokenizer(str(DEMO))
    prefix = encode_prefix(tokenizer)
    learn, judge = make_tickets(NUM_CALIBRATION, CALIBRATION_SEED), make_tickets(NUM_HELD_OUT, JUDGE_SEED)
    return Case(
        name="demo",
        model=DEMO,
        group_size=128,
        calibration=[prefix + prompt + answer for prompt, answer in encode_tickets(tokenizer, learn)],
        held_out=[prefix + prompt for prompt, _ in encode_tickets(tokenizer, judge)],
        max_tokens=64,
        gold=[ticket.gold for ticket in judge],
    )


def real_cases() -> list[Case]:
    """The real checkpoint, where it is there; calibrated and judged on text that it samples itself."""
    model = SHARED_MODELS / "stories260K"
    if not model.exists():
        return []
    engine = Engine(EngineConfig(model=str(model), dtype="float32"))
    starts = ["Once upon a time", "One day", "There was a", "The dog", "Lily and Tom", "A little girl", "In the park"]
    prompts = [engine.tokenizer.encode(starts[i % len(starts)]) for i in range(NUM_CALIBRATION + NUM_HELD_OUT // 2)]
    answers = engine.generate(prompts, SamplingParams(max_tokens=160, temperature=1.0, seed=JUDGE_SEED))
    texts = [prompt + answer.outputs[0].token_ids for prompt, answer in zip(prompts, answers)]
    held_out = [text[:96] for text in texts[NUM_CALIBRATION:]]
    return [Case("stories260K", model, 64, texts[:NUM_CALIBRATION], held_out, max_tokens=48)]


def measure_case(case: Case, folder: Path, console: Console) -> tuple[list[Row], float | None]:
    """All methods on one model, and the original's share of right answers."""
    sampling = SamplingParams(max_tokens=case.max_tokens, temperature=0)
    original = Engine(EngineConfig(model=str(case.model), dtype="float32"))
    reference = measure_reference(original, case.held_out, sampling)
    exact = share_right(case, original, [row.token_ids[row.num_prompt :] for row in reference.rows])
    rows: list[Row] = []
    plan: dict[Part, int] | None = None
    for method in (*METHODS, MIXED):
        output = folder / f"{case.name}-{method}"
        settings = QuantizeSettings.model_validate({"method": method.split(",")[0], "group_size": case.group_size})
        checkpoint = open_checkpoint(str(case.model))
        if method == MIXED:  # after gptq with 4 bits throughout, whose size it may have
            plan = choose_plan(checkpoint, case, settings, rows[-1].bits_per_weight)
        result = quantize(checkpoint, output, settings, sequences=case.calibration, plan=plan)
        engine = Engine(EngineConfig(model=str(output), dtype="float32", linear_compute="dense"))
        judged = compare(reference, engine)
        row = Row(
            model=case.name,
            method=method,
            bits_per_weight=result.bits_per_weight,
            quality=summarise(judged, "all"),
            exact=share_right(case, engine, [row.answer_b for row in judged]),
            logit_error=logit_error(output, case.held_out[:4]),
            is_bit_equal=is_decoded_alike(open_checkpoint(str(output)), output),
        )
        rows.append(row)
        console.print(f"{case.name} {method}: KL {row.quality.kl_mean.value:.2e}, exact {row.exact}")
    return rows, exact


def choose_plan(checkpoint: Checkpoint, case: Case, settings: QuantizeSettings, bits: float) -> dict[Part, int]:
    """3, 4, 8 or 16 bits for each part of each layer by measured sensitivity, in so many bits per weight."""
    choices = measure_sensitivity(checkpoint, case.calibration, settings)
    return choose_bits(choices, bytes_for_bits(choices, checkpoint, bits))


def share_right(case: Case, engine: Engine, answers: Sequence[list[int]]) -> float | None:
    """Share of answers that are the gold text to the letter."""
    if case.gold is None:
        return None
    texts = [engine.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return sum(text == gold for text, gold in zip(texts, case.gold)) / len(case.gold)


def case_bars(case: Case, rows: Sequence[Row], exact: float | None) -> list[Bar]:
    """The bars of one model."""
    by_method = {row.method: row for row in rows}
    kl = {method: row.quality.kl_mean for method, row in by_method.items()}
    bars = [Bar(f"KL mean {method}, {case.name}", kl[method].value, None, unit="nats") for method in kl]
    for worse, better in itertools.pairwise(METHODS):
        value = kl[better].low / kl[worse].high
        bars.append(Bar(f"KL {better} (low end) over {worse} (high end), {case.name}", value, 1.0, at_least=False))
    ratio = kl[MIXED].value / kl["gptq"].value
    bars.append(Bar(f"KL gptq with bits by sensitivity over gptq at 4 bits, same size, {case.name}", ratio, None))
    ratio = kl["gptq"].value / kl["rtn"].value
    bars.append(Bar(f"KL gptq over rtn, {case.name}", ratio, MAX_RATIO, at_least=False))
    if exact is not None:
        for method, row in by_method.items():
            bar = None if method == "rtn" else MAX_POINTS_LOST
            lost = 100 * (exact - (row.exact or 0.0))
            bars.append(Bar(f"exact match lost by {method}, {case.name}", lost, bar, at_least=False, unit="points"))
    error = max(row.logit_error for row in rows)
    bars.append(Bar(f"logits of transformers, relative, {case.name}", error, MAX_LOGIT_ERROR, at_least=False))
    alike = min(float(row.is_bit_equal) for row in rows)
    bars.append(Bar(f"weights equal to an independent decoder's, {case.name}", alike, 1.0))
    return bars


@torch.inference_mode()
def logit_error(output: Path, prompts: Prompts) -> float:
    """Largest difference between transformers' logits and those of the decoded weights, over the largest logit."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    worst = 0.0
    for prompt in prompts:
        ours = torch.cat(list(walk(open_checkpoint(str(output)), [prompt], torch.device("cpu"))))
        theirs = model(torch.tensor([prompt])).logits[0]
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


def is_decoded_alike(checkpoint: Checkpoint, folder: Path) -> bool:
    """Is every packed layer what a plain reading of the format's description makes of the files, bit for bit?"""
    stored: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    packed = [linear for linear in checkpoint.architecture.linears() if f"{linear.name}.weight_packed" in stored]
    return bool(packed) and all(
        np.array_equal(
            checkpoint.read_linear(linear).numpy(), decode_plainly(stored, linear.name, checkpoint)
        )
        for linear in packed
    )  # fmt: skip


def decode_plainly(stored: dict[str, torch.Tensor], name: str, checkpoint: Checkpoint) -> np.ndarray:
    """A symmetric layer from its bits, by numpy: value i is bits [i b, (i + 1) b) of the row, low bits first."""
    num_out, num_in = stored[f"{name}.weight_shape"].tolist()
    words = stored[f"{name}.weight_packed"].numpy()
    format = checkpoint.packed_format(name)
    assert format is not None and format.symmetric
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : num_in * format.bits]
    q = (stream.reshape(num_out, num_in, format.bits) << np.arange(format.bits)).sum(-1)
    scale = stored[f"{name}.weight_scale"].float().numpy()
    centred = (q - (1 << (format.bits - 1))).astype(np.float32)
    return (centred.reshape(num_out, scale.shape[1], -1) * scale[:, :, None]).reshape(num_out, num_in)


def cost_bars(folder: Path, console: Console) -> list[Bar]:
    """Time and memory of quantising, and of loading the result, on random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    source, output = folder / "random", folder / "random-int4"
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    billions = sum(weight.numel() for weight in model.parameters()) / 1e9
    model.save_pretrained(source)
    del model
    bars = []
    for method in METHODS:
        target = output if method == "gptq" else folder / f"random-{method}"
        seconds, peak_bytes = in_own_process(quantize_random, str(source), str(target), method)
        console.print(f"random 135M, {method}: {seconds:.1f} s, {peak_bytes / 2**20:.0f} MiB")
        bars.append(Bar(f"seconds per billion weights, {method}", seconds / billions, None, unit="s"))
        bars.append(Bar(f"peak GiB per billion weights, {method}", peak_bytes / billions / 2**30, None, unit="GiB"))
    _, peak_bytes = in_own_process(load_random, str(output))
    stored = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    layer = 2 * SHAPE["hidden_size"] * (4 * SHAPE["hidden_size"] + 3 * SHAPE["intermediate_size"])
    share = peak_bytes / (MAX_LOAD_MEMORY * stored + layer)
    bars.append(Bar("peak memory at load over 1.15 x stored bytes + a layer", share, 1.0, at_least=False))
    return bars


def in_own_process(work: Callable[..., float], *arguments: str) -> tuple[float, int]:
    """The function's result, and by how many bytes the peak of its process's memory grew."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_with_peak, (work, arguments))


def _with_peak(work: Callable[..., float], arguments: tuple[str, ...]) -> tuple[float, int]:
    torch.ones(8, 8) @ torch.ones(8, 8)  # the libraries' own memory is not the model's
    before = _peak_bytes()
    result = work(*arguments)
    return result, _peak_bytes() - before


def _peak_bytes() -> int:
    """Of this process alone: the maximum that getrusage knows is inherited from the parent."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def quantize_random(source: str, output: str, method: str) -> float:
    """Quantise on 16 random sequences of 256 tokens; returns the seconds."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SHAPE["vocab_size"], (16, 256), generator=generator).tolist()
    settings = QuantizeSettings.model_validate({"method": method, "group_size": SHAPE_GROUP_SIZE})
    return quantize(open_checkpoint(source), Path(output), settings, sequences=tokens).seconds


def load_random(model: str) -> float:
    """Load as the engine does, int4 only."""
    from actors.decoder import load_decoder

    config = EngineConfig(model=model, linear_compute="int4", device="cpu", dtype="bfloat16")
    load_decoder(open_checkpoint(model), config, torch.device("cpu"), torch.bfloat16)
    return 0.0


def table_row(row: Row, exact: float | None) -> dict[str, Any]:
    """What the record keeps of a row."""
    quality = row.quality
    return {
        "model": row.model,
        "method": row.method,
        "bits_per_weight": round(row.bits_per_weight, 3),
        "kl_mean": quality.kl_mean.value,
        "kl_mean_interval": [quality.kl_mean.low, quality.kl_mean.high],
        "kl_p99": quality.kl_p99.value,
        "top1_agreement": quality.top1_agreement.value,
        "same_answers": quality.exact_match.value,
        "right_answers": row.exact,
        "right_answers_original": exact,
    }


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table of a record's `quality`, for the README."""
    lines = [
        "| model | method | bits per weight | KL mean (95 % interval) | KL p99 | same top token | right answers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table:
        low, high = row["kl_mean_interval"]
        right = row["right_answers"]
        answers = "" if right is None else f"{right:.1%} (original {row['right_answers_original']:.1%})"
        lines.append(
            f"| {row['model']} | {row['method']} | {row['bits_per_weight']:.2f} | {row['kl_mean']:.4f} "
            f"({low:.4f} to {high:.4f}) | {row['kl_p99']:.3f} | {row['top1_agreement']:.1%} | {answers} |"
        )
    return "\n".join(lines)


def paste_table(record: Path, readme: Path) -> None:
    """Replace what stands between MARKERS in `readme` by the table of a kept record. ValueError without markers."""
    paste_between(MARKERS, markdown(json.loads(record.read_text())["config"]["quality"]), readme)


if __name__ == "__main__":
    paste_table(Path(sys.argv[1]), Path(sys.argv[2]))
