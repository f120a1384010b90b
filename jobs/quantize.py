"""`shoal quantize MODEL OUT`: a 16-bit checkpoint becomes a compressed-tensors one, with a model card.

Reads the options and the calibration prompts, shows progress, and writes what was measured into the card. The work is
`actors.quantizers`'. Run again after a crash, the same command continues with the layer that was not finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from actors.quantizers.layer_rounding import CALIBRATED_METHODS
from actors.quantizers.run import OnProgress, QuantizeResult, QuantizeSettings, quantize
from actors.quantizers.sensitivity import Choice, Part, bytes_for_bits, choose_bits, measure_sensitivity
from actors.weights.checkpoint import Checkpoint, open_checkpoint
from jobs.calibration import Calibration, CalibrationColumns, read_calibration
from jobs.run import named_models
from pipeline.job import identify_model

SENSITIVITY_FILE = "sensitivity.json"
BAR_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Target:
    """How large the result may be: bits per weight of the decoder's linear layers, or bytes of the whole checkpoint."""

    bits: float | None = None
    num_bytes: int | None = None


def run_quantize(
    model: str,
    output: str,
    settings: QuantizeSettings,
    calibrate: str | None = None,
    columns: CalibrationColumns | None = None,
    num_rows: int = 256,
    max_row_tokens: int = 1024,
    target: Target | None = None,
    device: str = "auto",
) -> int:
    """Quantise and report; returns the exit code. ValueError for whatever does not fit, before anything is written."""
    console = Console()
    model = named_models().get(model, model)
    checkpoint = open_checkpoint(model)
    target = target or Target()
    if calibrate is None and (settings.method in CALIBRATED_METHODS or target != Target()):
        need = "a target size" if settings.method not in CALIBRATED_METHODS else f"method {settings.method}"
        raise ValueError(f"{need} needs prompts to measure on; give --calibrate PROMPTS.parquet (or a job file)")
    calibration = Calibration("none", [])
    if calibrate is not None:
        calibration = read_calibration(
            calibrate, model, num_rows=num_rows, max_tokens=max_row_tokens, columns=columns or CalibrationColumns()
        )
    sequences, held_out = calibration.split()
    on = _device(device)
    with _progress(console) as on_progress:
        plan, choices = _plan_bits(checkpoint, sequences, settings, target, on, on_progress)
    if plan is not None:
        console.print(choices_table(choices, plan))
        console.print(choices_plot(choices, plan))
    extra = {} if plan is None else {SENSITIVITY_FILE: sensitivity_json(choices, plan)}
    with _progress(console) as on_progress:
        result = quantize(
            checkpoint,
            Path(output),
            settings,
            sequences=sequences,
            held_out=held_out,
            plan=plan,
            device=on,
            source_identity=identify_model(model),
            make_card=lambda result: model_card(model, calibration, len(sequences), result, plan),
            extra_files=extra,
            on_progress=on_progress,
        )
    console.print(result_table(result, output))
    for kept in result.kept:
        console.print(f"note: {kept} stays in 16 bits: no group size of 32 or more divides its inputs")
    return 0


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}; it must be auto, cpu or cuda") from error


def _plan_bits(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    settings: QuantizeSettings,
    target: Target,
    device: torch.device,
    on_progress: OnProgress,
) -> tuple[dict[Part, int] | None, dict[Part, list[Choice]]]:
    """The bits of each part, or None where no target was given."""
    if target.bits is None and target.num_bytes is None:
        return None, {}
    if target.bits is not None and target.num_bytes is not None:
        raise ValueError("--target-bits and --target-bytes are both given; keep one")
    choices = measure_sensitivity(checkpoint, sequences, settings, device, on_progress)
    if target.bits is not None:
        budget = bytes_for_bits(choices, checkpoint, target.bits)
    else:
        budget = (target.num_bytes or 0) - other_bytes(checkpoint, settings)
    return choose_bits(choices, budget), choices


def other_bytes(checkpoint: Checkpoint, settings: QuantizeSettings) -> int:
    """Bytes of what is not rounded by the plan: embedding, norms, biases and the head as it will be written."""
    decoder = {linear.name for linear in checkpoint.architecture.linears() if linear.name != "lm_head"}
    size = 0
    for name in checkpoint.names():
        is_rounded_head = name == "lm_head.weight" and settings.head != "16bit"
        if name.removesuffix(".weight") not in decoder and not is_rounded_head:
            size += torch.Size(checkpoint.shape(name)).numel() * checkpoint.dtype.itemsize
    if settings.head != "16bit":
        vocab, hidden = checkpoint.architecture.vocab_size, checkpoint.architecture.hidden_size
        bits = {"int4": 4, "int8": 8}[settings.head]
        size += vocab * hidden * bits // 8 + vocab * (hidden // (settings.group_size or hidden)) * 2
    return size


class _progress:  # noqa: N801  (a context manager that reads as a verb)
    """A progress bar, as the callback that the quantisers call."""

    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )

    def __enter__(self) -> OnProgress:
        self._bar.__enter__()
        task = self._bar.add_task("", total=None, visible=False)

        def on_progress(done: int, total: int, what: str) -> None:
            self._bar.update(task, completed=done, total=total, description=what, visible=True)

        return on_progress

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)  # type: ignore[arg-type]


def choices_table(choices: Mapping[Part, Sequence[Choice]], plan: Mapping[Part, int]) -> Table:
    """Mean KL per part and width, the chosen width marked."""
    table = Table(title="KL (nats per token) when this part alone is rounded; chosen: bold")
    widths = sorted({choice.bits for some in choices.values() for choice in some})
    for heading in ("layer", "part", *(f"{bits} bits" for bits in widths), "chosen"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for (index, part), some in choices.items():
        by_bits = {choice.bits: choice.kl for choice in some}
        cells = [
            "" if bits not in by_bits else f"[bold]{by_bits[bits]:.2e}[/]" if plan[index, part] == bits else
            f"{by_bits[bits]:.2e}"
            for bits in widths
        ]  # fmt: skip
        table.add_row(str(index), part, *cells, str(plan[index, part]))
    return table


def choices_plot(choices: Mapping[Part, Sequence[Choice]], plan: Mapping[Part, int]) -> str:
    """A bar per part: its KL at 4 bits (or the fewest it can have) on a log scale, and the bits that it got."""
    at_four = {
        part: next((choice.kl for choice in some if choice.bits == 4), some[0].kl) for part, some in choices.items()
    }
    shown = [kl for kl in at_four.values() if kl > 0]
    if not shown:
        return ""
    low, high = torch.tensor([min(shown), max(shown)]).log().tolist()
    lines = [f"KL at 4 bits, log scale from {min(shown):.1e} to {max(shown):.1e}, and the bits chosen"]
    for (index, part), kl in at_four.items():
        share = 0.0 if kl <= 0 else (float(torch.tensor(kl).log()) - low) / max(high - low, 1e-9)
        bar = "█" * max(1, round(share * BAR_WIDTH))
        lines.append(f"{index:>3} {part:<8} {bar:<{BAR_WIDTH}} {plan[index, part]:>2}")
    return "\n".join(lines)


def sensitivity_json(choices: Mapping[Part, Sequence[Choice]], plan: Mapping[Part, int]) -> str:
    """What was measured and chosen, for whoever wants to plot it."""
    rows = [
        {
            "layer": index,
            "part": part,
            "chosen_bits": plan[index, part],
            "choices": [{"bits": c.bits, "num_bytes": c.num_bytes, "kl": c.kl} for c in some],
        }
        for (index, part), some in choices.items()
    ]
    return json.dumps(rows, indent=2) + "\n"


def result_table(result: QuantizeResult, output: str) -> Table:
    """What the command prints at the end."""
    table = Table(title=output, show_header=False)
    for name, value in _facts(result).items():
        table.add_row(name, value)
    return table


def _facts(result: QuantizeResult) -> dict[str, str]:
    settings = result.settings
    groups = "one scale per row" if settings.group_size is None else f"groups of {settings.group_size}"
    facts = {
        "method": settings.method,
        "weights": f"{result.bits_per_weight:.3f} bits each, scales included; {groups}, "
        + ("symmetric" if settings.symmetric else "with zero points"),
        "output head": settings.head.replace("16bit", "16 bits"),
        "size": f"{result.num_bytes:,} bytes, of {result.original_bytes:,}",
        "time": f"{result.seconds:.1f} s",
    }
    if (divergence := result.divergence) is not None:
        facts |= {
            "KL from the original": f"mean {divergence.kl_mean:.2e}, 99th percentile {divergence.kl_p99:.2e} nats per "
            f"token, on {divergence.num_tokens:,} held-out tokens",
            "same likeliest token": f"{divergence.top1_agreement:.2%}",
        }
    return facts


def model_card(
    model: str, calibration: Calibration, num_rows: int, result: QuantizeResult, plan: Mapping[Part, int] | None
) -> str:
    """README.md of the new checkpoint. Holds no prompt."""
    name = Path(model.rstrip("/")).name
    data = (
        f"{calibration.name}, {num_rows} rows, {result.num_calibration_tokens:,} distinct tokens"
        if result.num_calibration_tokens
        else "none"
    )
    facts = {**_facts(result), "calibration data": data}
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    mixed = "" if plan is None else f"\nBits were chosen per layer by measured sensitivity: `{SENSITIVITY_FILE}`.\n"
    kept = "".join(
        f"- {part} stays in 16 bits: no group size of 32 or more divides its inputs\n" for part in result.kept
    )
    licence = _licence(model)
    return f"""---
base_model: {name}
library_name: transformers
pipeline_tag: text-generation
tags: [compressed-tensors, {result.settings.method}]
{licence}---
# {name}, quantised by Shoal

| | |
| --- | --- |
{rows}
{mixed}{kept}
Format: compressed-tensors, pack-quantized. Made with `shoal quantize`; settings:

```json
{result.settings.model_dump_json(indent=2)}
```
"""


def _licence(model: str) -> str:
    """The license line of the source's own card, if there is one on this machine."""
    card = Path(model) / "README.md"
    if "://" in model or not card.exists():
        return ""
    found = re.search(r"^license: *(\S+)$", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return f"license: {found[1]}\n" if found else ""
