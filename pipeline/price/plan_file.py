"""What a plan says of a run before it, and the file `plan.json` in which `shoal plan --keep` leaves it in an output.

Read again by `shoal run`, which warns of a budget below the price, and beside the bill. Knows no torch, so that
`shoal status` is quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.shards import Shard
from pipeline.storage import Storage

FILE = "plan.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and the interval that it lies in with a chance of 95 %; None where there is none to give."""

    value: float
    low: float | None = None
    high: float | None = None

    def holds(self, actual: float) -> bool | None:
        """Whether a number is inside; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return self.low <= actual <= self.high


@dataclass(frozen=True, slots=True)
class Pool:
    """The same work on another number of actors."""

    num_actors: int
    wall_s: float
    cost_usd: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A corpus and a run over it. Tokens count duplicates as the bill does; times are None without step times.

    computed_prompt_tokens: at best. device_s = busy_s + num_actors x (load_s + idle_s). wall_s: from the first actor to
    the last, without starting Ray. slower_than_steps: the factor that busy_s has over the steps of the model.
    """

    num_rows: int
    num_error_rows: Figure
    errors: dict[str, float]
    num_duplicates: Figure
    prompt_tokens: Figure
    computed_prompt_tokens: Figure
    achievable_hit_rate: float | None
    achieved_hit_rate: float | None = None
    completion_tokens: Figure | None = None
    busy_s: Figure | None = None
    device_s: Figure | None = None
    wall_s: Figure | None = None
    cost_usd: Figure | None = None
    prefill_share: float | None = None
    load_s: float | None = None
    idle_s: float | None = None
    slower_than_steps: float | None = None
    pools: list[Pool] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Estimate:
        """What `dataclasses.asdict` made of one."""
        figures = {
            name: Figure(**value) for name, value in data.items() if isinstance(value, dict) and "value" in value
        }
        return cls(**{**data, **figures, "pools": [Pool(**pool) for pool in data["pools"]]})


@dataclass(frozen=True, slots=True)
class Plan:
    """An estimate, and what it is of: the job by its fingerprint, the corpus by a digest of its files' versions.

    sample, answers, step_times, price: where each is from, for a person.
    """

    fingerprint: str
    corpus: str
    num_shards: int
    num_actors: int
    made_at: str
    sample: str
    answers: str
    step_times: str
    price: str
    estimate: Estimate

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self)}

    def write(self, output: Storage) -> None:
        output.write_whole(FILE, json.dumps(self.to_json(), indent=1).encode())


def corpus_digest(shards: Iterable[Shard]) -> str:
    """Changes when a file of the input is added, removed or changed."""
    digest = hashlib.blake2b(digest_size=16)
    for shard in sorted(shards, key=lambda shard: shard.name):
        digest.update(f"{shard.name}\x1f{shard.etag}\x1f{shard.num_rows}\x1e".encode())
    return digest.hexdigest()


def read_plan(output: Storage) -> tuple[Plan | None, str]:
    """The plan that was kept in an output, or why there is none that can be read; "" if none was kept."""
    try:
        data = json.loads(output.read_bytes(FILE))
    except FileNotFoundError:
        return None, ""
    except ValueError as error:
        return None, f"{FILE} is not valid JSON ({error}); run shoal plan --keep again"
    version = data.pop("version", None) if isinstance(data, dict) else None
    if version != VERSION:
        return None, f"{FILE} is of version {version!r}, this Shoal reads {VERSION}; run shoal plan --keep again"
    try:
        return Plan(**{**data, "estimate": Estimate.from_json(data["estimate"])}), ""
    except (TypeError, KeyError, AttributeError) as error:
        return None, f"{FILE} cannot be read ({error}); run shoal plan --keep again"
