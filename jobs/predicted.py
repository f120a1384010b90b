"""What a kept plan had to say, before a run and beside its bill. Called by `jobs.run` and `jobs.status`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from pipeline.bill.ledger import Bill, read_bill
from pipeline.bill.progress import predicted_table, seconds, usd
from pipeline.job import Job
from pipeline.price.plan_file import Figure, Plan, corpus_digest, read_plan
from pipeline.shards import Shard
from pipeline.storage import Storage

PLAN_AGAIN = "run shoal plan --keep again"


def say_prediction(
    job: Job, shards: Sequence[Shard], todo: Sequence[Shard], output: Storage, say: Callable[[str], None]
) -> None:
    """Say what a plan in the output expects of the shards to do, whether it is of another job or corpus, and which
    limits are below it."""
    spent = describe_spent(job, output)
    if spent:
        say(spent)
    plan, problem = read_plan(output)
    if problem:
        say(f"plan: {problem}")
    if plan is None:
        return
    if plan.fingerprint != job.fingerprint():
        say(f"plan: plan.json is of another job and tells nothing of this one; {PLAN_AGAIN}")
        return
    if plan.corpus != corpus_digest(shards):
        num_rows = sum(shard.num_rows for shard in shards)
        say(
            f"plan: the corpus has changed since the plan was made ({plan.num_shards:,} shards with "
            f"{plan.estimate.num_rows:,} rows then, {len(shards):,} with {num_rows:,} now); {PLAN_AGAIN}"
        )
    num_todo = sum(shard.num_rows for shard in todo)
    for line in _warnings(job, plan, num_todo / max(1, plan.estimate.num_rows)):
        say(f"plan: {line}")


def describe_spent(job: Job, output: Storage) -> str:
    """What earlier runs have spent, which a budget does not know of; "" if nothing, or without a budget."""
    if job.limits.budget_usd is None:
        return ""
    spent = read_bill(output).cost_usd
    if not spent:
        return ""
    limit = f"limits.budget_usd={job.limits.budget_usd:g}"
    return f"{limit} is for one run; earlier runs have spent {usd(spent)} on this output"


def print_predicted(console: Console, output: Storage, bill: Bill, fingerprint: str) -> None:
    """Print predicted beside actual, if a plan of this job was kept."""
    plan, problem = read_plan(output)
    if problem:
        console.print(f"plan: {problem}", highlight=False, soft_wrap=True)
    if plan is not None and plan.fingerprint == fingerprint:
        console.print(predicted_table(plan, bill), highlight=False)


def _warnings(job: Job, plan: Plan, share: float) -> list[str]:
    """share: of the planned rows that are still to do; limits are those of one run."""
    if share == 0 or plan.estimate.cost_usd is None or plan.estimate.wall_s is None:
        return []
    cost, wall, limits = _times(plan.estimate.cost_usd, share), _times(plan.estimate.wall_s, share), job.limits
    left = "" if share == 1 else " for what is left"
    lines = [f"{between(cost, usd)} and {between(wall, seconds)} expected{left}"]
    if limits.budget_usd is not None and limits.budget_usd < (cost.high or cost.value):
        likely = "below the expected cost" if limits.budget_usd < cost.value else "inside the interval of the cost"
        lines.append(
            f"WARNING: limits.budget_usd={limits.budget_usd:g} is {likely}; the run "
            f"{'will' if limits.budget_usd < (cost.low or cost.value) else 'may'} stop before the corpus is done"
        )
    if limits.deadline_s is not None and limits.deadline_s < wall.value:
        lines.append(
            f"WARNING: limits.deadline_s={limits.deadline_s:g} is below the expected {seconds(wall.value)}; the run "
            "will probably stop before the corpus is done"
        )
    return lines


def _times(figure: Figure, share: float) -> Figure:
    return Figure(*(None if x is None else x * share for x in (figure.value, figure.low, figure.high)))  # type: ignore[arg-type]


def between(figure: Figure, show: Callable[[float], str]) -> str:
    """A figure and, unless it is exact, its interval."""
    if figure.low is None or figure.high is None or figure.low == figure.high:
        return show(figure.value)
    return f"{show(figure.value)} ({show(figure.low)} to {show(figure.high)})"
