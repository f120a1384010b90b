"""`shoal demo`: make a corpus of support tickets, answer it with the shipped model, and check the answers.

The run itself is the same as anybody's (`shoal run`); this file only makes its input and reads its output.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console

from jobs.demo.tickets import write_corpus

JOB_FILE = Path(__file__).with_name("job.yaml")


@dataclass(frozen=True, slots=True)
class Score:
    """How many of the rows with a gold answer were answered right: as the same JSON, and as the same text."""

    num_gold: int
    num_same_json: int
    num_same_text: int
    num_errors: int


def demo(rows: int = 2000, output: str = "demo-output") -> int:
    """Run the demo in the folder `output` and return the run's exit code; a second time it finds its work done."""
    from jobs.run import run

    folder = Path(output)
    shards = write_corpus(folder / "corpus", num_rows=rows)
    job = folder / JOB_FILE.name
    shutil.copyfile(JOB_FILE, job)
    console = Console()
    console.print(
        f"{rows:,} support tickets in {len(shards)} shards of {folder / 'corpus'}; the job: {job}", soft_wrap=True
    )
    exit_code = run(str(job), [])
    if exit_code == 0:
        report(console, folder / "answers")
    return exit_code


def report(console: Console, answers: Path) -> None:
    """Print how good the answers are and where they lie."""
    score = score_answers(sorted((answers / "results").glob("*.parquet")))
    console.print(
        f"[bold]accuracy {score.num_same_json / score.num_gold:.1%}[/bold]: {score.num_same_json:,} of "
        f"{score.num_gold:,} answers are the gold JSON ({score.num_same_text:,} to the letter); "
        f"{score.num_errors:,} rows became error rows",
        soft_wrap=True,
    )
    console.print(f"answers: {answers / 'results'}", soft_wrap=True)
    console.print(f"the bill, shard by shard: {answers / 'metrics'} (the table above is its sum)", soft_wrap=True)


def score_answers(results: list[Path]) -> Score:
    """Compare `response` with `gold` in results files."""
    rows = [row for path in results for row in pq.read_table(path, columns=["gold", "response", "error"]).to_pylist()]
    judged = [row for row in rows if row["gold"] is not None]
    return Score(
        num_gold=len(judged),
        num_same_json=sum(_is_same_json(row["response"], row["gold"]) for row in judged),
        num_same_text=sum(row["response"] == row["gold"] for row in judged),
        num_errors=sum(row["error"] is not None for row in rows),
    )


def _is_same_json(response: str | None, gold: str) -> bool:
    try:
        return json.loads(response or "") == json.loads(gold)
    except ValueError:
        return False
