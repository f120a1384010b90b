"""`shoal bench engine`: the engine against transformers' `generate` on the same model and prompts.

A Llama shape of about 135 million random bfloat16 weights, made on the spot; 64 prompts of 288 tokens, of which the
first 256 are the same or not, 64 new tokens each. transformers runs in both float32 and bfloat16 and in two batch
sizes, and the fastest of these is the baseline. Beside it the physical floors: the machine's own matrix and copy rates.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from actors.config import EngineConfig
from actors.engine import Engine
from actors.requests import SamplingParams
from jobs.bench.result import Bar, BenchResult
from kernels.cpu_linear import dtype_name

NUM_PROMPTS, NUM_SHARED, NUM_OWN, NUM_NEW = 64, 256, 32, 64
VOCAB = 49152
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MIN_SHARE_OF_EQUAL_ROWS = 0.96
"""float32 sums in another order tip a near tie once in a while; more than 2 rows of 64 would be a fault."""

Prompts = list[list[int]]


def bench_engine() -> BenchResult:
    """Check, then time; takes some minutes on two cores."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        cases = {"shared prefix": make_prompts(shared=True), "no shared prefix": make_prompts(shared=False)}
        baselines = {name: _Baseline() for name in cases}
        for dtype in (torch.float32, torch.bfloat16):
            run = load_transformers(model, dtype)
            for name, prompts in cases.items():
                for batch_size in (64, 32):
                    baselines[name].take(f"{dtype_name(dtype)}, batches of {batch_size}", *run(prompts, batch_size))
                    console.print(f"transformers, {name}, {baselines[name].latest}")
            del run

        equal = {name: _share_equal(model, prompts, baselines[name].float32) for name, prompts in cases.items()}
        console.print("rows whose float32 tokens equal transformers': " + _percentages(equal))
        is_correct = min(equal.values()) >= MIN_SHARE_OF_EQUAL_ROWS

        rates = measure_rates()
        bars = [
            Bar(f"rows equal to transformers', {name}", share, MIN_SHARE_OF_EQUAL_ROWS) for name, share in equal.items()
        ]
        config = {"shape": SHAPE, "prompts": NUM_PROMPTS, "shared": NUM_SHARED, "own": NUM_OWN, "new": NUM_NEW}
        for name, needed in (("shared prefix", 4.0), ("no shared prefix", 1.4)):
            all_seconds, engine = time_engine(model, cases[name])
            seconds = min(all_seconds)
            console.print(f"engine, {name}, {dtype_name(engine.dtype)}: {seconds:.2f} s")
            baseline = baselines[name]
            bars.append(Bar(f"speed-up over transformers, {name}", baseline.seconds / seconds, needed, unit="x"))
            bars.append(Bar(f"output tokens per second, {name}", NUM_PROMPTS * NUM_NEW / seconds, None))
            floor_s = arithmetic_floor_s(engine, shared=name == "shared prefix", rates=rates)
            bars.append(Bar(f"share of the arithmetic floor, {name}", floor_s / seconds, None))
            config[name] = {
                "baseline": baseline.label,
                "baseline_seconds": baseline.all_seconds,
                "engine_seconds": [round(s, 3) for s in all_seconds],
                "engine_dtype": dtype_name(engine.dtype),
                "engine_linears": engine.decoder.describe(),
                "num_steps": engine.stats.num_steps,
            }
    return BenchResult("engine", is_correct, bars, config, machine={"rates": rates})


class _Baseline:
    """The fastest of transformers' runs on one set of prompts, and the tokens of its float32 run."""

    def __init__(self) -> None:
        self.seconds = float("inf")
        self.label = ""
        self.latest = ""
        self.all_seconds: dict[str, float] = {}
        self.float32: Prompts = []

    def take(self, label: str, seconds: float, tokens: Prompts) -> None:
        self.all_seconds[label] = round(seconds, 3)
        self.latest = f"{label}: {seconds:.2f} s"
        if not self.float32:
            self.float32 = tokens
        if seconds < self.seconds:
            self.seconds, self.label = seconds, label


def make_model(folder: Path) -> str:
    """Write the random model and a tokenizer that knows its ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))  # noqa: S106
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return str(folder)


def make_prompts(shared: bool) -> Prompts:
    """64 prompts of 288 random tokens, with or without their first 256 in common."""
    rng = random.Random(7)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(count)]

    prefix = tokens(NUM_SHARED)
    return [(prefix if shared else tokens(NUM_SHARED)) + tokens(NUM_OWN) for _ in range(NUM_PROMPTS)]


def load_transformers(model: str, dtype: torch.dtype) -> Callable[[Prompts, int], tuple[float, Prompts]]:
    """A function that answers prompts in batches and returns seconds and tokens."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    @torch.inference_mode()
    def run(prompts: Prompts, batch_size: int) -> tuple[float, Prompts]:
        tokens: Prompts = []
        started = time.perf_counter()
        for first in range(0, len(prompts), batch_size):
            inputs = torch.tensor(prompts[first : first + batch_size])
            outputs = module.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=NUM_NEW,
                do_sample=False,
                pad_token_id=0,
            )
            tokens += outputs[:, inputs.shape[1] :].tolist()
        return time.perf_counter() - started, tokens

    run([[1] * 8], 1)
    return run


def time_engine(model: str, prompts: Prompts, num_runs: int = 3) -> tuple[list[float], Engine]:
    """Seconds of several runs, each on a new engine with an empty cache, loading not counted; and the last engine."""
    all_seconds = []
    for _ in range(num_runs):
        engine = Engine(EngineConfig(model=model))
        engine.generate([[1] * 8], SamplingParams(max_tokens=2, ignore_eos=True))
        started = time.perf_counter()
        engine.generate(prompts, _sampling())
        all_seconds.append(time.perf_counter() - started)
    return all_seconds, engine


def measure_rates() -> dict[str, float]:
    """The machine's float32 and bfloat16 matrix rates and its copy rate, each the best of several."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 2048, dtype=dtype), torch.ones(2048, 2048, dtype=dtype)
        seconds = _best_seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        rates[f"{dtype_name(dtype)}_gemm_gflop_per_s"] = round(2 * 1024 * 2048 * 2048 / seconds / 1e9, 1)
    source = torch.ones(256 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    rates["copy_gb_per_s"] = round(2 * source.numel() / _best_seconds(lambda: target.copy_(source)) / 1e9, 2)
    return rates


def arithmetic_floor_s(engine: Engine, *, shared: bool, rates: dict[str, float]) -> float:
    """Seconds that the matrix products alone take at the measured rate: every distinct prompt token and every new one
    through the layers once, every new one through the head."""
    num_prompt = NUM_SHARED + NUM_PROMPTS * NUM_OWN if shared else NUM_PROMPTS * (NUM_SHARED + NUM_OWN)
    num_new = NUM_PROMPTS * NUM_NEW
    flop = 2 * engine.decoder.num_linear_weights * (num_prompt + num_new)
    flop += 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"] * num_new
    return flop / (rates[f"{dtype_name(engine.dtype)}_gemm_gflop_per_s"] * 1e9)


def _share_equal(model: str, prompts: Prompts, expected: Prompts) -> float:
    engine = Engine(EngineConfig(model=model, dtype="float32"))
    completions = engine.generate(prompts, _sampling())
    return sum(c.outputs[0].token_ids == e for c, e in zip(completions, expected)) / len(prompts)


def _sampling() -> SamplingParams:
    return SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)


def _best_seconds(work: Callable[[], object]) -> float:
    work()
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _percentages(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
