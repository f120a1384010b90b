"""The command `shoal`: declares the commands, calls the file of the same name, and turns mistakes into exit codes.

Imports each command's file only when it is called, so that `shoal schema` needs neither torch nor Ray.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_FINGERPRINT_MISMATCH = 5

FLOORS = ("kernels", "actors", "pipeline", "jobs")

app = typer.Typer(
    name="shoal",
    help="Batch inference over a corpus of prompts: a row in, a row out, and a bill that adds up.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"shoal {version('shoal')}")
        raise typer.Exit()


@app.callback()
def shoal(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Declares the options that stand before a command."""


@app.command("run")
def run_command(
    job: Annotated[str, typer.Argument(help="The job file (YAML).")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in --set sampling.max_tokens=64."),
    ] = None,
) -> None:
    """Answer a corpus; run again to continue or to add what is new."""
    from jobs.run import run

    raise typer.Exit(run(job, overrides or []))


@app.command("plan")
def plan_command(
    job: Annotated[str, typer.Argument(help="The job file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as for shoal run.")
    ] = None,
    sample_rows: Annotated[int, typer.Option(min=1, help="Rows to read; a smaller corpus is counted whole.")] = 4000,
    pilot_rows: Annotated[
        int | None, typer.Option(min=0, help="Rows to answer on this machine, 0 for none; else what takes 3 s.")
    ] = None,
    output_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer, instead of a pilot.")] = None,
    step_times: Annotated[
        str | None, typer.Option(help="A file of another output's step_times/, for a device that is not here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample and of the interval.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave plan.json in the output, for run and status.")] = False,
) -> None:
    """Say what a run would read, take and cost, with an interval, before it."""
    from jobs.plan import PlanSettings, plan

    settings = PlanSettings(sample_rows, pilot_rows, output_tokens, step_times, seed)
    raise typer.Exit(plan(job, overrides or [], settings, as_json=as_json, keep=keep))


@app.command("status")
def status_command(output: Annotated[str, typer.Argument(help="A run's output folder, local or any URI.")]) -> None:
    """Say how far a run is and what it cost, from the files that it published."""
    from jobs.status import status

    raise typer.Exit(status(output))


@app.command("nightly")
def nightly_command(
    job: Annotated[str, typer.Argument(help="The job file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as for shoal run.")
    ] = None,
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="For a night that is still at work.")] = 0.0,
    dry_run: Annotated[bool, typer.Option(help="Say what is new and what it may cost, and do nothing.")] = False,
    history: Annotated[bool, typer.Option(help="Print the last nights, and do nothing.")] = False,
    last: Annotated[int, typer.Option(min=1, help="How many nights --history prints.")] = 30,
    strict: Annotated[bool, typer.Option(help="Exit 7 if all is done but the night was not as usual.")] = False,
    recompute: Annotated[
        bool, typer.Option(help="If the job has changed, answer the whole corpus again, in place of what is there.")
    ] = False,
    remove_vanished: Annotated[
        bool, typer.Option(help="Remove the results of shards whose input file is gone.")
    ] = False,
) -> None:
    """Answer what is new or changed, alone on its output, and keep a history of the nights."""
    from jobs.nightly import NightlySettings, foretell, nightly, show_history

    if history:
        raise typer.Exit(show_history(job, overrides or [], last))
    if dry_run:
        raise typer.Exit(foretell(job, overrides or []))
    settings = NightlySettings(wait, recompute, remove_vanished, strict)
    raise typer.Exit(nightly(job, overrides or [], settings))


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of the job file."""
    from jobs.schema import schema

    raise typer.Exit(schema())


@app.command("serve")
def serve_command(
    config: Annotated[str | None, typer.Argument(help="The endpoint's settings (YAML); none: --set says all.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set one key, as in --set model=demo or --set port=9000."),
    ] = None,
) -> None:
    """Answer OpenAI's clients online, until stopped."""
    from jobs.ingress import choose_ingress

    with tempfile.TemporaryDirectory(prefix="shoal-serve-") as folder:
        choose_ingress(Path(folder))
        from jobs.serve import run_serve  # after that: Serve reads the environment when it is imported

        raise typer.Exit(run_serve(config, overrides or []))


@app.command("demo")
def demo_command(
    rows: Annotated[int, typer.Option(min=1, help="How many support tickets to make and answer.")] = 2000,
    output: Annotated[str, typer.Option(help="Folder for the corpus and the answers.")] = "demo-output",
) -> None:
    """Answer a made-up corpus with the shipped model, and check the answers."""
    from jobs.demo.main import demo

    raise typer.Exit(demo(rows=rows, output=output))


@app.command("quantize")
def quantize_command(
    model: Annotated[str, typer.Argument(help="A 16-bit model directory, local or any URI, or the word demo.")],
    output: Annotated[str, typer.Argument(help="Folder to write the checkpoint to; must not exist.")],
    method: Annotated[str, typer.Option(help="rtn, hqq, awq or gptq; the last two need --calibrate.")] = "gptq",
    bits: Annotated[int, typer.Option(help="3, 4 or 8.")] = 4,
    group_size: Annotated[str, typer.Option(help="Weights that share a scale: 32, 64, 128, or channel.")] = "128",
    calibrate: Annotated[
        str | None, typer.Option(help="Prompts to calibrate and measure on: Parquet, or a job file (.yaml).")
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of texts in the Parquet files.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Column of messages in the Parquet files.")] = None,
    response_column: Annotated[str | None, typer.Option(help="Column of answers, read behind each prompt.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows of it; an eighth of them only measures.")] = 256,
    row_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a row that are used.")] = 1024,
    head: Annotated[str, typer.Option(help="The output head: int8, int4 or 16bit.")] = "16bit",
    target_bits: Annotated[
        float | None, typer.Option(help="Choose 3, 4, 8 or 16 bits per layer by sensitivity, so many on average.")
    ] = None,
    target_bytes: Annotated[int | None, typer.Option(help="The same, by the size of the whole checkpoint.")] = None,
    asymmetric: Annotated[
        bool, typer.Option(help="Zero points: less error; transformers reads them with dequantize=True only.")
    ] = False,
    act_order: Annotated[bool, typer.Option(help="gptq: columns by importance, scales found beforehand.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Make an int4 checkpoint (compressed-tensors) of a 16-bit one; run again to continue after a crash."""
    from actors.quantizers.run import QuantizeSettings
    from jobs.calibration import CalibrationColumns
    from jobs.quantize import Target, run_quantize

    settings = QuantizeSettings.model_validate(
        {
            "method": method,
            "bits": bits,
            "group_size": None if group_size == "channel" else group_size,
            "symmetric": not asymmetric,
            "head": head,
            "act_order": act_order,
        }
    )
    columns = CalibrationColumns(prompt_column, messages_column, response_column)
    target = Target(target_bits, target_bytes)
    raise typer.Exit(run_quantize(model, output, settings, calibrate, columns, rows, row_tokens, target, device))


@app.command("bench")
def bench_command(
    name: Annotated[str, typer.Argument(help="Which; a name that is none lists them.")],
    keep: Annotated[str | None, typer.Option(help="Folder in which the JSON is kept too.")] = None,
    only: Annotated[
        str | None, typer.Option(help="kernels, online, plan: one part; with --tune, as in g128/16.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0.5, help="online: of the soak; else 30.")] = None,
    interpret: Annotated[bool, typer.Option("--interpret", help="kernels: in Triton's interpreter, no times.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="kernels: find int4_linear's tiles on this GPU.")] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="plan: rows to plan, instead of a million.")] = None,
) -> None:
    """Measure against a baseline in the same command; the last line is JSON."""
    from jobs.bench import bench

    given = {"only": only, "minutes": minutes, "interpret": interpret, "tune": tune, "rows": rows}
    raise typer.Exit(bench(name, keep, **{option: value for option, value in given.items() if value}))


@app.command("quality")
def quality_command(
    model_a: Annotated[str, typer.Argument(help="The reference: a Hugging Face directory, any URI, or demo.")],
    model_b: Annotated[str, typer.Argument(help="The model to compare with it.")],
    prompts: Annotated[str | None, typer.Option(help="Parquet file, folder or glob of prompts.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of texts; default: prompt.")] = None,
    messages_column: Annotated[str | None, typer.Option(help="Column of OpenAI-style messages instead.")] = None,
    system: Annotated[str | None, typer.Option(help="System message; uses the chat template.")] = None,
    job: Annotated[str | None, typer.Option(help="Take the prompts and sampling of a job file instead.")] = None,
    settings_a: Annotated[
        list[str] | None, typer.Option("--a", metavar="KEY=VALUE", help="Engine setting of A.")
    ] = None,
    settings_b: Annotated[
        list[str] | None, typer.Option("--b", metavar="KEY=VALUE", help="Of B, as in --b kv_cache_dtype=int8.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of both.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows drawn over all shards.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample and of the intervals.")] = 0,
    out: Annotated[str | None, typer.Option(help="Where to write the report, as Parquet.")] = None,
) -> None:
    """Say how far a model is from a reference on your prompts: KL, perplexity, agreement, exact match."""
    from jobs.quality import Prompts, quality

    both = settings or []
    source = Prompts(prompts, prompt_column, messages_column, system, job)
    raise typer.Exit(
        quality(
            model_a,
            model_b,
            source,
            settings_a=[*both, *(settings_a or [])],
            settings_b=[*both, *(settings_b or [])],
            num_rows=rows,
            max_tokens=max_tokens,
            seed=seed,
            out=out,
        )
    )


@app.command("train-demo")
def train_demo_command(
    output: Annotated[str, typer.Option(help="Folder for the two models.")] = "demo-models",
) -> None:
    """Train the shipped model and its draft again, from seeds."""
    from jobs.demo.train import train

    raise typer.Exit(train(output))


def main() -> None:
    """Run the command line and exit: 2 and a message for a mistake of the user, 1 and a traceback for one of ours."""
    try:
        _refuse_namesakes()
        app()
    except Exception as error:
        if not is_users_mistake(error):
            traceback.print_exc()
            raise SystemExit(EXIT_BUG) from error
        print(f"shoal: {error}", file=sys.stderr)
        raise SystemExit(_exit_code(error)) from error


def is_users_mistake(error: BaseException) -> bool:
    """A bad setting: one of Shoal's own ValueErrors, pydantic's, or a plain one that Shoal itself raised.

    A ValueError out of the depths of a library is a bug, and keeps its traceback.
    """
    if not isinstance(error, ValueError):
        return False
    if isinstance(error, ValidationError) or any(base.__module__.split(".")[0] in FLOORS for base in type(error).mro()):
        return True
    return type(error) is ValueError and _raised_in(error).split(".")[0] in FLOORS


def _raised_in(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


def _exit_code(error: BaseException) -> int:
    from pipeline.job import FingerprintMismatch

    return EXIT_FINGERPRINT_MISMATCH if isinstance(error, FingerprintMismatch) else EXIT_USAGE


def _refuse_namesakes() -> None:
    """Shoal's folders have common names: `kernels` is also a package of Hugging Face's, and would be found instead."""
    ours = Path(__file__).resolve().parents[1]
    for floor in FLOORS:
        spec = importlib.util.find_spec(floor)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin is None or origin.parents[1] != ours:
            raise ValueError(
                f"the package {floor!r} comes from {origin}, and Shoal's own is {ours / floor}; "
                f"uninstall the other package named {floor!r}, or run Shoal in a virtual environment of its own"
            )
