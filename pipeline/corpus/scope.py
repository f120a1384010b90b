"""Whether shards are planned each by itself or all as one corpus: what a sample says is cheaper.

A corpus plan computes prefixes once that shards share, and folds their duplicates; it costs a pass over all rows while
the actors wait. Both are estimated from a sample, the same one every time. What is chosen changes no answer. Called by
`jobs.run`; knows no Ray.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from actors.weights.checkpoint import load_tokenizer
from pipeline.corpus.slice_load import USUAL_SHARE_OF_MAX_TOKENS, token_prices
from pipeline.corpus_plan.carrying import find_carried
from pipeline.corpus_plan.manifest import CORPUS, find_manifest
from pipeline.job import Job
from pipeline.prefix_plan import PackedRow, order_rows, pack_row
from pipeline.price.corpus_sample import expected_computed, expected_rows, render_sample
from pipeline.price.device_profile import DeviceProfile, find_profile
from pipeline.prompts import Renderer
from pipeline.shards import Shard, ShardError
from pipeline.slice_runner import max_actors
from pipeline.slices import list_slices
from pipeline.storage import Storage

FILE = "scope.json"

MAX_SAMPLE_ROWS, MIN_SAMPLE_ROWS = 4096, 512
SAMPLE_SHARE = 0.125
"""Of the corpus' rows, what is read to decide, within these limits."""

MAX_SAMPLE_SHARDS = 16

MIN_GAIN = 0.05
"""Share of the work that a corpus plan must save at least: its pass is to cost at most 2 % of a run, and what a sample
says is a few percent off."""

PASS_OVER_RENDERING = 1.25
"""What planning a corpus takes over rendering and tokenising its rows, which every plan has to: 175 us of a core for
each of a million rows of 300 tokens (`shoal bench plan --only planning`), of which rendering takes 135 to 170."""

Scope = Literal["shard", "corpus"]


@dataclass(frozen=True, slots=True)
class ScopeChoice:
    """reason: for a person. The rest: estimates, where a sample was read. Tokens are of prompts to compute.

    saved_s: device time that a corpus plan saves, pass_s: what its pass costs of it; None without step times.
    """

    scope: Scope
    reason: str
    sample_rows: int = 0
    tokens_by_shard: int | None = None
    tokens_by_corpus: int | None = None
    duplicates_across: int | None = None
    saved_share: float | None = None
    saved_s: float | None = None
    pass_s: float | None = None

    def describe(self) -> str:
        """One line."""
        if self.tokens_by_shard is None or self.tokens_by_corpus is None:
            return f"plan: scope {self.scope} ({self.reason})"
        figures = (
            f"prompt tokens to compute about {self.tokens_by_shard:,} shard by shard, {self.tokens_by_corpus:,} as one "
            f"corpus; {self.duplicates_across:,} duplicates across shards"
        )
        if self.saved_s is not None and self.pass_s is not None:
            figures += f"; {self.saved_s:.1f} s of device time saved, {self.pass_s:.1f} s spent waiting for the plan"
        return f"plan: scope {self.scope} ({self.reason}; {figures}; from {self.sample_rows:,} rows)"


def choose_scope(job: Job, listed: Sequence[Shard], to_do: Sequence[Shard]) -> ScopeChoice:
    """What to do with these shards: as the job says; else as the run before began; else what is cheaper.

    listed: all shards of the input. Leaves the choice in the output, so that a run that is continued keeps it.
    """
    output = Storage(job.output.path)
    if job.plan.scope != "auto":
        return ScopeChoice(job.plan.scope, "as the job says")
    manifest, _ = find_manifest(output, job.fingerprint(), job.plan, listed, to_do)
    if manifest is not None:
        return ScopeChoice("corpus", "auto: the corpus is planned already")
    answered = list_slices(output, CORPUS).get(CORPUS, {})
    if answered and find_carried(output, job.fingerprint(), listed, to_do, answered).slices:
        return ScopeChoice("corpus", "auto: a part of it was answered as one corpus")
    kept = _read_choice(output)
    left = {shard.name for shard in to_do}
    if kept is not None and left <= set(kept.get("shards", [])):
        return ScopeChoice(kept["scope"], "auto: as this run began")
    choice = weigh_scopes(job, to_do, find_profile(job, output))
    output.write_whole(FILE, json.dumps({**asdict(choice), "shards": sorted(left)}, indent=1).encode())
    return choice


def _read_choice(output: Storage) -> dict[str, Any] | None:
    try:
        kept = json.loads(output.read_bytes(FILE))
    except FileNotFoundError:
        return None
    return kept if isinstance(kept, dict) and kept.get("scope") in ("shard", "corpus") else None


def weigh_scopes(job: Job, to_do: Sequence[Shard], profile: DeviceProfile | None) -> ScopeChoice:
    """What is cheaper for these shards, whatever the job says; writes nothing."""
    shards = [shard for shard in to_do if shard.num_rows]
    if len(shards) < 2:
        return ScopeChoice("shard", "auto: there is one shard")
    gain = measure_gain(job, load_tokenizer(job.engine.tokenizer or job.model), shards)
    prices = token_prices(job, profile.times if profile else None)
    answer = prices.answer * job.sampling.max_tokens * job.sampling.n * USUAL_SHARE_OF_MAX_TOKENS
    work = prices.prompt * gain.tokens_by_shard + answer * gain.rows_by_shard
    saved = prices.prompt * (gain.tokens_by_shard - gain.tokens_by_corpus) + answer * gain.duplicates_across
    saved_share = saved / work if work else 0.0
    saved_s = pass_s = None
    if profile is None:
        is_cheaper = saved_share > MIN_GAIN
        why = f"saves {saved_share:.1%} of the tokens" if saved > 0 else "saves nothing"
    else:
        pass_wall_s = PASS_OVER_RENDERING * gain.rendering_s / max(1, os.cpu_count() or 1)
        saved_s, pass_s = saved, max_actors(job) * max(0.0, pass_wall_s - profile.load_s)
        is_cheaper = saved_s > max(pass_s, MIN_GAIN * work)
        why = f"saves {saved_share:.1%} of the time"
    return ScopeChoice(
        "corpus" if is_cheaper else "shard",
        f"auto: planning the corpus as one {why}",
        gain.num_read,
        round(gain.tokens_by_shard),
        round(gain.tokens_by_corpus),
        round(gain.duplicates_across),
        saved_share,
        saved_s,
        pass_s,
    )


@dataclass(frozen=True, slots=True)
class CorpusGain:
    """What is to be computed of all shards, in either scope; estimated where not all rows were read.

    rows: different ones. rendering_s: CPU time of rendering and tokenising all rows.
    """

    num_read: int
    rows_by_shard: float
    rows_by_corpus: float
    tokens_by_shard: float
    tokens_by_corpus: float
    rendering_s: float

    @property
    def duplicates_across(self) -> float:
        return self.rows_by_shard - self.rows_by_corpus


def measure_gain(job: Job, tokenizer: Any, shards: Sequence[Shard], num_rows: int | None = None) -> CorpusGain:
    """Read about `num_rows` rows of up to MAX_SAMPLE_SHARDS shards, of which none is empty; the same ones every time.

    A shard that cannot be read is left out: the run will say what is wrong with it.
    """
    rng = random.Random(0)
    total = sum(shard.num_rows for shard in shards)
    if num_rows is None:
        num_rows = min(MAX_SAMPLE_ROWS, max(MIN_SAMPLE_ROWS, int(total * SAMPLE_SHARE)))
    chosen = list(shards) if len(shards) <= MAX_SAMPLE_SHARDS else rng.sample(list(shards), MAX_SAMPLE_SHARDS)
    num_chosen = sum(shard.num_rows for shard in chosen)
    renderer = Renderer(job, tokenizer)
    everything: list[PackedRow] = []
    rows_by_shard = tokens_by_shard = 0.0
    rendering_s, num_read, num_there = 0.0, 0, 0
    for shard in chosen:
        wanted = max(1, round(num_rows * shard.num_rows / num_chosen))
        started = time.process_time()
        try:
            rendered = list(render_sample(renderer, shard, wanted, rng))
        except ShardError:
            continue
        rendering_s += time.process_time() - started
        rows = [pack_row(job, shard, index, row) for index, row in rendered]
        num_read += len(rows)
        num_there += shard.num_rows
        good = [row for row in rows if row.error is None]
        own_rows, own_tokens = _expect(good, shard.num_rows * len(good) / max(1, len(rows)))
        rows_by_shard += own_rows
        tokens_by_shard += own_tokens
        everything += good
    scale = total / max(1, num_there)
    rows_by_corpus, tokens_by_corpus = _expect(everything, total * len(everything) / max(1, num_read))
    return CorpusGain(
        num_read,
        max(scale * rows_by_shard, rows_by_corpus),
        rows_by_corpus,
        max(scale * tokens_by_shard, tokens_by_corpus),
        tokens_by_corpus,
        rendering_s * total / max(1, num_read),
    )


def _expect(rows: Sequence[PackedRow], num_all: float) -> tuple[float, float]:
    """Different rows, and prompt tokens to compute, of `num_all` rows planned together of which these were read."""
    if not rows:
        return 0.0, 0.0
    for row in rows:
        row.duplicates.clear()
    kept, shared = order_rows(rows)
    counts = np.array([1 + len(row.duplicates) for row in kept], np.int64)
    num_different = expected_rows(counts, len(rows), num_all)
    lengths = np.array([len(row.token_ids) for row in kept], np.int64)
    return num_different, expected_computed(lengths, shared.astype(np.int64), num_different / len(kept))
