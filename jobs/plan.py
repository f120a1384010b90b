"""`shoal plan JOB`: what a run would read, write, take and cost, before it; from footers, a sample, and a pilot.

Starts no Ray and writes nothing, unless asked to keep the plan in the output. What it says and where that is from is in
`docs/plan.md`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from actors.weights.checkpoint import check_model, load_tokenizer
from jobs.predicted import between, describe_spent
from jobs.run import named_models
from pipeline.bill.pricing import price_of
from pipeline.bill.progress import count, new_console, percent, seconds, usd
from pipeline.corpus.scope import ScopeChoice, weigh_scopes
from pipeline.fields.field_gain import GAIN_ROWS, measure_gain, settle_field_order
from pipeline.job import Job, JobError, load_job
from pipeline.price.corpus_sample import CorpusSample, sample_corpus
from pipeline.price.device_profile import DeviceProfile, find_profile, read_profile
from pipeline.price.estimate import estimate
from pipeline.price.experience import Experience, read_experience, run_pilot, runs_here
from pipeline.price.plan_file import Plan, corpus_digest
from pipeline.results import published_shards
from pipeline.shards import Shard, ShardList, list_shards
from pipeline.slice_runner import max_actors
from pipeline.storage import Storage, absolute_uri, public_uri

SAMPLE_ROWS = 4000
PILOT_S = 3.0
"""How long a pilot takes, about, unless it was told how many rows to answer."""

MOST_PILOT_ROWS = 1024
BAR_WIDTH = 40
NUM_BINS = 8


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """What `shoal plan` was asked for. pilot_rows None: as many as take PILOT_S. output_tokens: of every answer, if no
    pilot is to tell. step_times: a file."""

    sample_rows: int = SAMPLE_ROWS
    pilot_rows: int | None = None
    output_tokens: int | None = None
    step_times: str | None = None
    seed: int = 0


def plan(job_path: str, overrides: Sequence[str], settings: PlanSettings, *, as_json: bool, keep: bool) -> int:
    """Print the plan of a job, as tables or as JSON, and return 0. ValueError for a mistake in the job or the input."""
    console = new_console()

    def say(text: str) -> None:
        if not as_json:
            console.print(text, highlight=False, soft_wrap=True)

    job = load_job(job_path, overrides).resolve(named_models())
    made, sample, experience = make_plan(job, settings, say)
    if keep:
        made.write(Storage(job.output.path))
    if as_json:
        print(json.dumps(made.to_json()))
        return 0
    console.print(_plan_table(made, experience), highlight=False)
    console.print(_distribution(sample), highlight=False)
    if made.estimate.pools:
        console.print(_pools_table(made), highlight=False)
    if keep:
        say(f"kept as {public_uri(Storage(job.output.path).uri_of('plan.json'))}")
    return 0


def make_plan(
    job: Job, settings: PlanSettings, say: Callable[[str], None]
) -> tuple[Plan, CorpusSample, Experience | None]:
    """The plan of a resolved job, what of the corpus it is from, and what of answers."""
    check_model(job.model)
    shards = list_shards(job)
    output = Storage(job.output.path)
    job = settle_field_order(job, shards.good, output, keep=False)
    tokenizer = load_tokenizer(job.engine.tokenizer or job.model)
    num_prompts = MOST_PILOT_ROWS if settings.pilot_rows is None else settings.pilot_rows
    sample = sample_corpus(job, tokenizer, shards.good, settings.sample_rows, settings.seed, num_prompts)
    notes = [f"shard {name} cannot be used and is not in these figures: {reason}" for name, reason in shards.bad]
    notes += [spent] if (spent := describe_spent(job, output)) else []
    notes += _gain_of_fields(job, tokenizer, shards.good, settings)
    profile = read_profile(absolute_uri(settings.step_times, Path.cwd())) if settings.step_times else None
    if profile is not None:
        _check_profile(job, profile)
    experience, measured = _gain_experience(job, sample, shards, output, settings, notes, say)
    if profile is None:
        profile = measured or find_profile(job, output)
    elif experience is not None:
        experience = experience.without_times()  # of another device, for all that is known
    if profile is None and not runs_here(job):
        notes.append("the pool's devices are not on this machine, whose times tell nothing about them")
    price = price_of(profile.device, job.pricing.usd_per_device_hour) if profile else None
    scope = _expected_scope(job, shards.good, profile)
    planned, waiting_s = sample, 0.0
    if scope.tokens_by_shard and scope.tokens_by_corpus is not None:
        notes.append(scope.describe())
        if scope.scope == "corpus":
            planned = sample.as_one_corpus(scope.tokens_by_corpus / scope.tokens_by_shard)
            waiting_s = (scope.pass_s or 0.0) / max_actors(job)
    found = estimate(
        job,
        planned,
        max_actors(job),
        experience,
        settings.output_tokens,
        profile,
        price,
        notes,
        settings.seed,
        waiting_s,
    )
    made = Plan(
        fingerprint=job.fingerprint(),
        corpus=corpus_digest(shards.good),
        num_shards=len(shards.good),
        num_actors=max_actors(job),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        sample=_describe_sample(sample),
        answers=_describe_answers(experience, settings.output_tokens),
        step_times=f"{profile.source} ({profile.device})" if profile else "",
        price=price.source if price else "",
        estimate=found,
    )
    return made, sample, experience


def _expected_scope(job: Job, shards: Sequence[Shard], profile: DeviceProfile | None) -> ScopeChoice:
    """What a run would choose, with its figures, unless the shards are to be planned each by itself."""
    if job.plan.scope == "shard":
        return ScopeChoice("shard", "as the job says")
    weighed = weigh_scopes(job, shards, profile)
    return weighed if job.plan.scope == "auto" else replace(weighed, scope="corpus", reason="as the job says")


def _gain_of_fields(job: Job, tokenizer: Any, shards: Sequence[Shard], settings: PlanSettings) -> list[str]:
    """What `plan.reorder_fields` gains, or would."""
    if len(job.prompt.template_fields) < 2:
        return []
    gain = measure_gain(job, tokenizer, shards, min(settings.sample_rows, GAIN_ROWS), settings.seed)
    if job.plan.reorder_fields:
        return [gain.describe()]
    if gain.reordered <= gain.as_written:
        return []
    return [
        f"plan.reorder_fields: true would raise achievable prefix hits from {gain.as_written:.1%} to "
        f"{gain.reordered:.1%}; it changes the prompts"
    ]


def _check_profile(job: Job, profile: DeviceProfile) -> None:
    mismatches = profile.mismatches(job)
    if mismatches:
        raise JobError(f"--step-times: {profile.source} was not measured for this job: {'; '.join(mismatches)}")


def _gain_experience(
    job: Job,
    sample: CorpusSample,
    shards: ShardList,
    output: Storage,
    settings: PlanSettings,
    notes: list[str],
    say: Callable[[str], None],
) -> tuple[Experience | None, DeviceProfile | None]:
    """From results of the same job in the output; else from a pilot, if one is wanted."""
    done = published_shards(output, shards.good, job.fingerprint())
    earlier = read_experience(job, output, sorted(done))
    if earlier is not None:
        return earlier, None
    if settings.output_tokens is not None or settings.pilot_rows == 0:
        return None, None
    if not sample.prompts:
        notes.append("no sampled row has a prompt that can be answered, so there was no pilot")
        return None, None
    say(f"pilot: answering {'some' if settings.pilot_rows is None else len(sample.prompts)} rows on this machine")
    try:
        experience, profile = run_pilot(job, sample.prompts, PILOT_S if settings.pilot_rows is None else None)
    except (ValueError, RuntimeError, MemoryError) as error:  # too large for this machine, or no device
        notes.append(f"no pilot was possible on this machine: {type(error).__name__}: {error}")
        return None, None
    num_failed = sum(experience.errors.values())
    if num_failed:
        kinds = ", ".join(f"{kind} {number}" for kind, number in sorted(experience.errors.items()))
        notes.append(
            f"{num_failed} of {experience.num_rows} pilot rows failed ({kinds}); a run would have such rows too"
        )
    if experience.own_share < 1 and experience.busy_s is not None:
        notes.append(
            f"this machine was busy: the pilot had its core for {experience.own_share:.0%} of the time; "
            "times are those of a machine that does nothing else"
        )
    return experience, profile


def _describe_sample(sample: CorpusSample) -> str:
    if sample.is_whole:
        return f"all {sample.num_rows:,} rows were counted"
    num_whole = sum(shard.is_whole for shard in sample.shards)
    parts = f"{num_whole} whole" if num_whole == len(sample.shards) else f"{num_whole} whole, of the others a part"
    return (
        f"estimated from {sample.num_read:,} of {sample.num_rows:,} rows, in {len(sample.shards)} of "
        f"{sample.num_shards:,} shards ({parts})"
    )


def _describe_answers(experience: Experience | None, output_tokens: int | None) -> str:
    if output_tokens is not None:
        return f"{output_tokens:,} tokens each, as given"
    if experience is None or len(experience.lengths_N) == 0:
        return ""
    lengths = experience.lengths_N
    p10, p50, p90 = np.percentile(lengths, [10, 50, 90])
    return f"{experience.source}: mean {lengths.mean():.1f} tokens, p10 {p10:.0f}, p50 {p50:.0f}, p90 {p90:.0f}"


def _plan_table(made: Plan, experience: Experience | None) -> Table:
    found = made.estimate
    table = Table(title="plan", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("rows", f"{found.num_rows:,} in {made.num_shards:,} shards; {made.sample}")
    kinds = ", ".join(f"{kind} {number:,.0f}" for kind, number in found.errors.items())
    table.add_row("", f"{between(found.num_error_rows, count)} error rows" + (f": {kinds}" if kinds else ""))
    table.add_row("", f"{between(found.num_duplicates, count)} duplicates within their shard, answered once")
    table.add_row(
        "prompt tokens",
        f"{between(found.prompt_tokens, count)}, of which {between(found.computed_prompt_tokens, count)} to compute",
    )
    expected = "" if found.achieved_hit_rate is None else f", {percent(found.achieved_hit_rate)} expected"
    table.add_row("prefix hits", f"{percent(found.achievable_hit_rate)} achievable{expected}")
    if found.completion_tokens is not None:
        table.add_row("completion tokens", f"{between(found.completion_tokens, count)}; {made.answers}")
    if experience is not None and experience.drafting.drafted:
        drafting = experience.drafting
        table.add_row(
            "speculation",
            f"{drafting.tokens_per_step:.2f} tokens a step, {drafting.drafted:.2f} drafted, as seen there",
        )
    _add_times(table, made)
    for note in found.notes:
        table.add_row("note", note)
    return table


def _add_times(table: Table, made: Plan) -> None:
    found = made.estimate
    if found.busy_s is None or found.device_s is None or found.wall_s is None or found.cost_usd is None:
        return
    num = made.num_actors
    table.add_row(
        "device time",
        f"{between(found.device_s, seconds)}: busy {between(found.busy_s, seconds)} "
        f"(prompts {percent(found.prefill_share)}), {num} x load {seconds(found.load_s or 0)}, "
        f"{num} x idle {seconds(found.idle_s or 0)}",
    )
    table.add_row("time", f"{between(found.wall_s, seconds)} with {num} actor{'s' if num > 1 else ''}")
    table.add_row("cost", between(found.cost_usd, usd))
    table.add_row("price", made.price)
    factor = found.slower_than_steps or 0.0
    table.add_row("step times", f"{made.step_times}; rows take {factor:.2f}x of what the steps alone do")


def _distribution(sample: CorpusSample) -> Table:
    """Prompt lengths of the rows that would be computed, in bins of equal width."""
    lengths = np.concatenate([shard.prompt_N for shard in sample.shards] or [np.zeros(0, np.int64)])
    table = Table(title="tokens of a prompt", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    if len(lengths) == 0:
        return table
    num_bins = int(min(NUM_BINS, lengths.max() - lengths.min() + 1))
    counts, edges = np.histogram(lengths, num_bins)
    for number, low, high in zip(counts, edges, edges[1:]):
        table.add_row(f"{low:,.0f} to {high:,.0f}", bar(number / counts.max()), f"{number / len(lengths):.1%}")
    return table


def _pools_table(made: Plan) -> Table:
    """Time and cost against the number of actors: work is divided, loading is not."""
    pools = made.estimate.pools
    table = Table(title="by number of actors", title_justify="left", box=None, pad_edge=False)
    for heading in ("actors", "time", "", "cost", ""):
        table.add_column(heading, justify="left" if heading == "" else "right", no_wrap=True)
    longest, dearest = max(pool.wall_s for pool in pools), max(pool.cost_usd for pool in pools)
    for pool in pools:
        table.add_row(
            f"{pool.num_actors}{' *' if pool.num_actors == made.num_actors else ''}",
            seconds(pool.wall_s),
            bar(pool.wall_s / longest, BAR_WIDTH // 2),
            usd(pool.cost_usd),
            bar(pool.cost_usd / dearest, BAR_WIDTH // 2) if dearest else "",
        )
    return table


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """A bar of so much of the width, in eighths of a character."""
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + ("" if eighths % 8 == 0 else " ▏▎▍▌▋▊▉"[eighths % 8])
