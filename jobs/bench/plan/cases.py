"""Jobs and corpora of `shoal bench plan`, made here; real ones are read from a folder `shared` beside the checkout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jobs.demo.main import JOB_FILE
from jobs.demo.tickets import write_corpus

SHARED = Path(__file__).resolve().parents[4] / "shared" / "corpora"

PLAIN: dict[str, Any] = {"input": {"prompt_column": "prompt"}, "prompt": None}
"""Over the demo's settings: prompts as they stand in the column."""


@dataclass(frozen=True, slots=True)
class Case:
    """A job: its corpus, and the settings that differ from the demo's. sample_rows: of the plan."""

    name: str
    corpus: Callable[[Path], None]
    settings: dict[str, Any]
    sample_rows: int = 4000


def write_case(case: Case, folder: Path) -> Path:
    """Write a case's corpus and job file into an empty folder; returns the job file."""
    (folder / "corpus").mkdir(parents=True)
    case.corpus(folder / "corpus")
    job_file = folder / "job.yaml"
    job_file.write_text(yaml.safe_dump(merged(yaml.safe_load(JOB_FILE.read_text()), case.settings)))
    return job_file


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections of `above` laid over those of `below`; None removes a section."""
    out = dict(below)
    for key, value in above.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = {**out.get(key, {}), **value} if isinstance(value, dict) else value
    return out


def price_cases() -> list[Case]:
    """Short and long, greedy and drawn, small batches and large ones, much and nothing shared."""
    made = [
        Case("tickets", tickets(1500), {}),
        Case("tickets, sampled", tickets(3000), {}, sample_rows=600),
        Case("few tickets", tickets(200), {}),
        Case("tickets, drawn", tickets(800), {"sampling": {"temperature": 1.0}}),
        Case("tickets, cut answers", tickets(1500), {"sampling": {"max_tokens": 12}}),
        Case("tickets, small batch", tickets(400), {"engine": {"max_num_seqs": 8}}),
        Case("tickets, three samples", tickets(400), {"sampling": {"temperature": 0.8, "n": 3}}),
        Case("tickets, no prefix cache", tickets(500), {"engine": {"enable_prefix_caching": False}}),
        Case("tickets, no drafts", tickets(1200), {"engine": {"speculative_config": {"method": "none"}}}),
        Case("tickets, plain weights", tickets(1000), {"engine": {"quantization": "none"}}),
        Case("documents", documents(120, 5), {**PLAIN, "sampling": {"max_tokens": 48}}),
        Case(
            "documents, long answers", documents(40, 5), {**PLAIN, "sampling": {"max_tokens": 200, "ignore_eos": True}}
        ),
        Case("documents, sampled", documents(500, 4), {**PLAIN, "sampling": {"max_tokens": 24}}, sample_rows=500),
        Case("nothing shared", documents(700, 1), {**PLAIN, "sampling": {"max_tokens": 32, "temperature": 0.7}}),
    ]
    read = [
        Case(name, shared(name), {**PLAIN, "sampling": {"max_tokens": tokens}})
        for name, tokens in (
            ("gsm8k_test_chat", 32),
            ("gsm8k_test_cot8", 16),
            ("humaneval", 64),
            ("ifeval", 48),
            ("mgsm_11lang", 16),
            ("mt_bench", 100),
        )
        if (SHARED / name).is_dir()
    ]
    return made + read


def tickets(num_rows: int) -> Callable[[Path], None]:
    """The demo's corpus."""

    def write(folder: Path) -> None:
        write_corpus(folder, num_rows)

    return write


def documents(num_documents: int, num_questions: int, num_words: tuple[int, int] = (10, 60)) -> Callable[[Path], None]:
    """Made-up documents of so many words with questions at their ends, scattered over eight shards."""

    def write(folder: Path) -> None:
        rng = np.random.default_rng(num_documents)
        words = ["".join(chr(c) for c in rng.integers(97, 123, rng.integers(2, 9))) for _ in range(500)]

        def text(count: int) -> str:
            return " ".join(words[i] for i in rng.integers(0, len(words), count))

        texts = [text(int(rng.integers(*num_words))) for _ in range(num_documents)]
        prompts = [f"{document}\n\n{text(8)}?" for document in texts for _ in range(num_questions)]
        order = rng.permutation(len(prompts))
        for number, part in enumerate(np.array_split(order, 8)):
            table = pa.table({"id": part, "prompt": [prompts[i] for i in part]})
            pq.write_table(table, folder / f"documents-{number}.parquet")

    return write


def shared(name: str) -> Callable[[Path], None]:
    """A corpus that lies beside the checkout."""

    def write(folder: Path) -> None:
        for path in sorted((SHARED / name).glob("*.parquet")):
            (folder / path.name).write_bytes(path.read_bytes())

    return write
