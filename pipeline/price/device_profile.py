"""How fast a device runs a job's model, kept as a small file: measured step times, and what loading took.

Every worker of a run leaves one in `<output>/step_times/`, so that a machine without such a device can plan for it.
Written by `pipeline.slice_runner`, read by `jobs.plan`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from actors.config import EngineConfig
from actors.step_times import StepTimes
from pipeline.job import Job, JobError
from pipeline.storage import Storage, StorageError, public_uri, split_uri

STEP_TIMES = "step_times"
VERSION = 1

_SETTINGS_WITHOUT_EFFECT_ON_STEPS = {
    "model",
    "tokenizer",
    "device",
    "max_num_batched_tokens",
    "num_pages",
    "kv_cache_bytes",
    "gpu_memory_utilization",
    "num_threads",
    "max_model_len",
    "speculative_config",
    "enable_prefix_caching",
}


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One kind of device with one model in it. device: as prices know it. settings: those that steps depend on.

    num_pages: of the engine there. source: where this is from, for a person.
    """

    device: str
    times: StepTimes
    num_pages: int | None
    load_s: float
    model_identity: str
    settings: Mapping[str, Any]
    measured_at: str
    source: str = ""

    @classmethod
    def of_worker(cls, job: Job, device: str, times: StepTimes, num_pages: int, load_s: float) -> DeviceProfile:
        """The profile of a worker that has just loaded a (resolved) job's model."""
        assert job.resolved is not None
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(
            device,
            times,
            num_pages,
            load_s,
            job.resolved.model_identity,
            speed_settings(job.engine),
            now,
        )

    @property
    def path(self) -> str:
        """Below an output; the same for the same device, model and settings."""
        key = json.dumps([self.model_identity, dict(self.settings)], sort_keys=True)
        digest = hashlib.blake2b(key.encode(), digest_size=4).hexdigest()
        return f"{STEP_TIMES}/{re.sub(r'[^A-Za-z0-9]+', '-', self.device).strip('-').lower()}-{digest}.json"

    def to_bytes(self) -> bytes:
        fields = {
            "version": VERSION,
            "device": self.device,
            "model_identity": self.model_identity,
            "settings": dict(self.settings),
            "num_pages": self.num_pages,
            "load_s": self.load_s,
            "measured_at": self.measured_at,
            "step_times": json.loads(self.times.to_json()),
        }
        return json.dumps(fields, indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> DeviceProfile:
        """What `to_bytes` wrote; JobError for anything else."""
        try:
            fields = json.loads(data)
            version = fields.pop("version")
            if version != VERSION:
                raise JobError(f"{place} has step times of version {version!r}, this Shoal reads {VERSION}; run again")
            times = StepTimes.from_json(json.dumps(fields.pop("step_times")))
            return cls(times=times, source=place, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, JobError):
                raise
            raise JobError(f"{place} holds no step times: {type(error).__name__}: {error}") from error

    def mismatches(self, job: Job) -> list[str]:
        """What of a (resolved) job these times were not measured with; a line each."""
        assert job.resolved is not None
        wanted = speed_settings(job.engine)
        lines = [
            f"engine.{name} is {wanted.get(name)!r}, and was {self.settings.get(name)!r}"
            for name in sorted(wanted.keys() | self.settings.keys())
            if wanted.get(name) != self.settings.get(name)
        ]
        if self.model_identity != job.resolved.model_identity:
            lines.insert(0, "the model is another one")
        return lines


def speed_settings(config: EngineConfig) -> dict[str, Any]:
    """The engine's settings that the time of a step depends on, as JSON has them."""
    return config.model_dump(mode="json", exclude=set(_SETTINGS_WITHOUT_EFFECT_ON_STEPS))


def keep_profile(output: Storage, profile: DeviceProfile) -> None:
    """Write the profile, unless the output has one of the kind already."""
    if not output.exists(profile.path):
        output.write_whole(profile.path, profile.to_bytes())


def find_profile(job: Job, output: Storage) -> DeviceProfile | None:
    """The newest profile in the output that fits the job; None if there is none."""
    found = []
    for file in output.list(STEP_TIMES):
        profile = DeviceProfile.from_bytes(output.read_bytes(file.path), public_uri(file.uri))
        if not profile.mismatches(job):
            found.append(profile)
    return max(found, key=lambda profile: profile.measured_at, default=None)


def read_profile(uri: str) -> DeviceProfile:
    """A profile that a user names; JobError if it is none."""
    storage, name = split_uri(uri)
    try:
        return DeviceProfile.from_bytes(storage.read_bytes(name), public_uri(uri))
    except (FileNotFoundError, StorageError) as error:
        raise JobError(f"{public_uri(uri)} cannot be read: {error}; give a file of an output's step_times/") from error
