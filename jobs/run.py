"""`shoal run JOB`: check everything that can be checked, then answer the corpus, and print the bill.

Whatever is wrong with the job, the model, the input or the output is said before Ray is started and a model loaded.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Protocol

from rich.console import Console

from actors.config import EngineConfig
from actors.drafters.draft_model import check_draft_model
from actors.weights.checkpoint import check_model, load_tokenizer, open_checkpoint, resolve_max_model_len
from jobs.named_models import named_models
from jobs.predicted import print_predicted, say_prediction
from pipeline.answering import Worker
from pipeline.bill.ledger import (
    Bill,
    RunRecord,
    WorkerTime,
    read_bill,
    read_metrics,
    write_run,
)
from pipeline.bill.progress import Progress, Tally, bill_table, new_console
from pipeline.claim import claim_output, refuse_other_job
from pipeline.corpus.scope import choose_scope
from pipeline.events import Event
from pipeline.fields.field_gain import measure_gain, settle_field_order
from pipeline.graph import (
    Graph,
    check_pool_fits,
    close_ray,
    start_ray,
)
from pipeline.job import Job, JobError, LimitsSection, load_job
from pipeline.prompts import Renderer
from pipeline.quality.quality_gate import check_quality, keep_measured
from pipeline.results import passthrough_columns, published_shards
from pipeline.shards import Shard, ShardList, list_shards, open_shard
from pipeline.slice_runner import RunSpec, max_actors
from pipeline.slices import drop_damaged, list_slices
from pipeline.storage import Storage, public_uri

EXIT_DONE, EXIT_BUG, EXIT_USAGE, EXIT_ERRORS, EXIT_LIMIT = 0, 1, 2, 3, 4
EXIT_SIGNAL = 128

DRAIN_S = 25
"""How long slices in flight may take to finish once a run is told to stop; Kubernetes kills after 30 s."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a run ends early; `drop_at` (monotonic) is when slices in flight are given up."""

    exit_code: int
    reason: str
    drop_at: float


class Onlooker(Protocol):
    """Whoever runs a run for a purpose of its own: hears of its events, may end it, and gets its record."""

    def note(self, event: Event) -> None: ...

    def find_stop(self) -> Stop | None: ...

    def close(self, record: RunRecord) -> None: ...


def run(
    job_path: str,
    overrides: Sequence[str],
    *,
    new_worker: Callable[[EngineConfig], Worker] | None = None,
    onlooker: Onlooker | None = None,
) -> int:
    """Answer a job's corpus into its output and return the exit code; what is there already is not done again.

    new_worker: instead of EngineWorker, for tests. onlooker: `shoal nightly`. ValueError (of job, model, input or
    output) is a mistake in what was asked, FingerprintMismatch another job's output; nothing has been computed then.
    """
    console = new_console()
    job = load_job(job_path, overrides).resolve(named_models())
    check_model(job.model)
    check_speculation(job)
    shards = list_shards(job)
    _check_columns(job, shards)
    output = Storage(job.output.path)
    refuse_other_job(output, job)
    job = settle_field_order(job, shards.good, output, keep=True)
    tokenizer = load_tokenizer(job.engine.tokenizer or job.model)
    Renderer(job, tokenizer)  # a missing chat template shows here

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    measured = check_quality(job, shards.good, output, say)
    claim_output(output, job)
    keep_measured(output, measured)
    fingerprint = job.fingerprint()
    done = published_shards(output, shards.good, fingerprint)
    todo = [shard for shard in shards.good if shard.name not in done]
    spec = RunSpec(_new_run_name(), job, fingerprint, new_worker)
    record = RunRecord(spec.run, started_at=time.time())
    tally = _start_tally(output, shards, todo, job.limits)
    say(_describe_start(job, shards, todo))
    if todo and job.plan.reorder_fields:
        say(measure_gain(job, tokenizer, todo).describe())
    say_prediction(job, shards.good, todo, output, say)
    stop = None
    if todo:
        choice = choose_scope(job, shards.good, todo)
        if len(todo) > 1:
            say(choice.describe())
        record.scope, record.plan = choice.scope, choice.describe()
        corpus = shards.good if choice.scope == "corpus" else None
        output.remove("_SUCCESS")
        stop = _answer(spec, todo, corpus, tally, record, console, onlooker)
    exit_code = _finish(output, job, shards, tally, record, stop, console, had_work=bool(todo))
    if onlooker is not None:
        onlooker.close(record)
    return exit_code


def _answer(
    spec: RunSpec,
    todo: Sequence[Shard],
    corpus: Sequence[Shard] | None,
    tally: Tally,
    record: RunRecord,
    console: Console,
    onlooker: Onlooker | None,
) -> Stop | None:
    """Run the graph until all is done or something stops it. corpus: of `Graph`."""
    is_ours = start_ray()
    try:
        check_pool_fits(spec.job)
        graph = Graph(spec, todo, drop_damaged(spec.output, list_slices(spec.output)), corpus)
        with _signals() as signals, Progress(console, tally) as progress:
            try:
                stop = _watch(graph, tally, spec.job, signals, progress, onlooker)
            except BaseException as error:
                _record_break(graph, record, spec.output, error)
                raise
        _close_accounts(graph, record)
        return stop
    finally:
        if is_ours:
            close_ray()


def _record_break(graph: Graph, record: RunRecord, output: Storage, error: BaseException) -> None:
    """Put a run that breaks on the bill, if that is still possible; the error itself is what the user has to see."""
    record.outcome, record.exit_code = f"broke: {type(error).__name__}", EXIT_BUG
    record.finished_at = time.time()
    try:
        _close_accounts(graph, record)
        write_run(output, record)
    except Exception as also:
        error.add_note(f"the run's record could not be written either: {also}")


def _watch(
    graph: Graph, tally: Tally, job: Job, signals: list[int], progress: Progress, onlooker: Onlooker | None
) -> Stop | None:
    stop: Stop | None = None
    for event in graph.events():
        tally.add(event)
        progress.update()
        if onlooker is not None:
            onlooker.note(event)
        if stop is None:
            asked = onlooker.find_stop() if onlooker is not None else None
            stop = _stop_by_signal(signals) or asked or _stop_by_limit(job, tally)
            if stop is not None:
                progress.say(f"stopping: {stop.reason}; slices in flight are finished first")
                graph.stop()
        elif time.monotonic() > stop.drop_at or len(signals) > 1:
            progress.say("slices in flight take too long and are dropped; the next run computes them again")
            break
    return stop


def _stop_by_signal(signals: Sequence[int]) -> Stop | None:
    if not signals:
        return None
    name = signal.Signals(signals[0]).name
    return Stop(EXIT_SIGNAL + signals[0], f"received {name}", time.monotonic() + DRAIN_S)


def _stop_by_limit(job: Job, tally: Tally) -> Stop | None:
    """Stop early enough that what is in flight still fits below the limit, as far as past slices tell."""
    limits = job.limits
    drop_at = time.monotonic() + DRAIN_S
    if tally.rows_error > limits.max_error_fraction * tally.rows_total:
        return Stop(EXIT_ERRORS, _too_many_errors(limits, tally), drop_at)
    if limits.deadline_s is not None:
        usual_s = tally.slice_wall_s / tally.slices_done if tally.slices_done else 0.0
        if tally.elapsed_s + usual_s >= limits.deadline_s:
            left_s = max(0.0, limits.deadline_s - tally.elapsed_s)
            reason = f"limits.deadline_s={limits.deadline_s:g} is reached after {tally.elapsed_s:.1f} s"
            return Stop(EXIT_LIMIT, reason, time.monotonic() + left_s + DRAIN_S)
    if limits.budget_usd is not None and tally.slices_done:
        num_in_flight = min(_max_in_flight(job), max(0, tally.slices_in_view - tally.slices_done - tally.slices_found))
        if tally.cost_usd + num_in_flight * tally.cost_usd / tally.slices_done >= limits.budget_usd:
            reason = f"limits.budget_usd={limits.budget_usd:g} is reached: ${tally.cost_usd:.6f} spent"
            return Stop(EXIT_LIMIT, f"{reason}, and {num_in_flight} slices are in flight", math.inf)
    return None


def _max_in_flight(job: Job) -> int:
    return max_actors(job) * job.pool.max_slices_in_flight


def _too_many_errors(limits: LimitsSection, tally: Tally) -> str:
    return (
        f"{tally.rows_error:,} of {tally.rows_total:,} rows are errors, above "
        f"limits.max_error_fraction={limits.max_error_fraction:g}"
    )


def _finish(
    output: Storage,
    job: Job,
    shards: ShardList,
    tally: Tally,
    record: RunRecord,
    stop: Stop | None,
    console: Console,
    *,
    had_work: bool,
) -> int:
    """Write the run's record and, if all is done, _SUCCESS; print the bill and what is missing."""
    failed = dict(shards.bad) | tally.failed
    exit_code, reason = _outcome(job, tally, stop, failed)
    record.exit_code, record.outcome, record.finished_at = exit_code, reason, time.time()
    record.num_slices_computed, record.num_slices_found = tally.slices_done, tally.slices_found
    record.num_engine_rebuilds = tally.num_engine_rebuilds
    if had_work:
        write_run(output, record)
    bill = read_bill(output)
    if exit_code == EXIT_DONE:
        output.write_whole("_SUCCESS", _summary(job, bill).encode())
    console.print(bill_table(bill, public_uri(output.uri)), highlight=False)
    print_predicted(console, output, bill, job.fingerprint())
    for name, why in sorted(failed.items()):
        print(f"shoal: shard {name}: {why}", file=sys.stderr)
    if exit_code != EXIT_DONE:
        print(f"shoal: {reason}", file=sys.stderr)
    return exit_code


def _outcome(job: Job, tally: Tally, stop: Stop | None, failed: dict[str, str]) -> tuple[int, str]:
    if stop is not None:
        again = "" if stop.exit_code == EXIT_ERRORS else "; run the same command again to continue"
        return stop.exit_code, f"stopped: {stop.reason}{again}"
    if tally.rows_error > job.limits.max_error_fraction * tally.rows_total:
        return EXIT_ERRORS, _too_many_errors(job.limits, tally)
    if failed:
        return EXIT_USAGE, f"{len(failed)} of {tally.num_shards} shards could not be answered; the others are done"
    assert tally.shards_done == tally.num_shards, f"{tally.shards_done} of {tally.num_shards} shards, and none failed"
    assert tally.rows_done == tally.rows_total, f"{tally.rows_done} of {tally.rows_total} rows, and nothing failed"
    return EXIT_DONE, "done"


def _summary(job: Job, bill: Bill) -> str:
    summary: dict[str, Any] = {
        "fingerprint": job.fingerprint(),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "estimates": [name for name in asdict(bill) if "estimate" in name],
        "bill": asdict(bill),
    }
    return json.dumps(summary, indent=2, ensure_ascii=False)


def _close_accounts(graph: Graph, record: RunRecord) -> None:
    ends = graph.close_accounts()
    record.recomputed_prefix_tokens = graph.recomputed_tokens
    record.held_s = math.fsum(end.held_s for end in ends)
    record.after_slices = WorkerTime(
        idle_s=math.fsum(end.idle_s for end in ends),
        lost_s=math.fsum(end.lost_s for end in ends),
        usd_per_device_hour=graph.usd_per_device_hour,
    )


def _start_tally(output: Storage, shards: ShardList, todo: Sequence[Shard], limits: LimitsSection) -> Tally:
    left = {shard.name for shard in todo}
    published = [shard for shard in shards.good if shard.name not in left]
    tally = Tally(
        rows_total=sum(shard.num_rows for shard in shards.good),
        rows_done=sum(shard.num_rows for shard in published),
        num_shards=len(shards.good) + len(shards.bad),
        shards_done=len(published),
        published=frozenset(shard.name for shard in published),
    )
    if limits.max_error_fraction < 1.0 and published:
        names = {shard.name for shard in published}
        tally.rows_error = sum(row["rows_error"] for row in read_metrics(output) if row["shard"] in names)
    return tally


def check_speculation(job: Job) -> None:
    """JobError for a draft model that cannot draft for this model, and for longer drafts than a row can be."""
    config = job.engine.speculative_config
    max_model_len = resolve_max_model_len(open_checkpoint(job.model).config, job.engine.max_model_len)
    is_told = "num_speculative_tokens" in config.model_fields_set
    if is_told and config.method != "none" and config.num_speculative_tokens >= max_model_len:
        raise JobError(
            f"engine.speculative_config.num_speculative_tokens={config.num_speculative_tokens} does not fit into rows "
            f"of at most {max_model_len} tokens; set it below that, or leave it out"
        )
    if config.model is None:
        return
    try:
        check_draft_model(job.model, config.model, job.engine.tokenizer)
    except ValueError as error:
        raise JobError(f"{error}; name another engine.speculative_config.model, or leave it out") from error


def _check_columns(job: Job, shards: ShardList) -> None:
    """OutputError for a column that Shoal also writes; one shard tells, plans check the others."""
    shard = shards.good[0]
    with open_shard(shard) as source:
        passthrough_columns(job, source.schema_arrow, shard.name)


def _describe_start(job: Job, shards: ShardList, todo: Sequence[Shard]) -> str:
    num_rows = sum(shard.num_rows for shard in shards.good)
    is_done = len(shards.good) - len(todo)
    finished = f", {is_done} of them done before" if is_done else ""
    return (
        f"{num_rows:,} rows in {len(shards.good)} shards{finished}; "
        f"model {public_uri(job.model)}, output {public_uri(job.output.path)}"
    )


def _new_run_name() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT as they come, instead of death; to be entered after Ray, which sets handlers of its own."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
