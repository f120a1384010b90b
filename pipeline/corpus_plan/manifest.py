"""What a planned corpus looks like from outside: its shards, its totals, and where each slice's rows lie.

Written last, so that it is the mark that planning is done; read by the driver, which holds it and none of the rows.
Knows no Ray and no engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.job import PlanSection
from pipeline.parquet import METADATA_KEY, to_parquet
from pipeline.prefix_plan import Slice, read_rows
from pipeline.shards import Shard, ShardError
from pipeline.slices import SliceName, list_slices
from pipeline.storage import Storage, public_uri

PLANS = "_plan"
MANIFEST = "manifest.parquet"
VERSION = 2

CORPUS = "_corpus"
"""Stands where a shard's name does in slices and slice objects of a corpus plan; no shard's name begins with _."""


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """A shard as it was when the corpus was planned."""

    name: str
    etag: str
    num_rows: int

    def is_still(self, shard: Shard) -> bool:
        return (self.etag, self.num_rows) == (shard.etag, shard.num_rows)


Inheritance = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class CarriedSlice:
    """A slice object of an earlier plan whose answers a new one keeps. Shards are numbers of `Carried.shards`.

    shards: those whose rows in it are answered by it. lost: one pair for each time that shards of it changed or went
    before they had results: these, and those that then shared out the time that was spent on them.
    """

    path: str
    shards: tuple[int, ...]
    lost: tuple[Inheritance, ...] = ()


@dataclass(frozen=True, slots=True)
class Carried:
    """What a plan has from those before it. generation: how many there were. shards: as they were when they were
    answered."""

    generation: int = 0
    shards: tuple[PlannedShard, ...] = ()
    slices: tuple[CarriedSlice, ...] = ()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Carried:
        """Of `asdict`."""
        slices = [
            CarriedSlice(
                one["path"], tuple(one["shards"]), tuple((tuple(lost), tuple(heirs)) for lost, heirs in one["lost"])
            )
            for one in data["slices"]
        ]
        return cls(data["generation"], tuple(PlannedShard(**shard) for shard in data["shards"]), tuple(slices))

    def paths_by_shard(self) -> dict[str, list[str]]:
        """Where each shard's answers are."""
        paths: dict[str, list[str]] = {}
        for one in self.slices:
            for number in one.shards:
                paths.setdefault(self.shards[number].name, []).append(one.path)
        return paths

    def names(self, numbers: Sequence[int]) -> list[str]:
        return [self.shards[number].name for number in numbers]


NOTHING_CARRIED = Carried()


@dataclass(frozen=True, slots=True)
class PlanTotals:
    """Of the whole corpus; tokens are those of the rows to compute, without their duplicates.

    num_duplicates_within: what folding shard by shard would find; num_duplicates_across: what only the whole corpus
    shows. achievable_prefix_tokens: all tokens, less the nodes of the corpus' prefix tree. num_rows_carried: rows that
    an earlier plan has answered, and that nothing else here counts.
    """

    num_rows: int = 0
    num_error_rows: int = 0
    num_duplicates_within: int = 0
    num_duplicates_across: int = 0
    prompt_tokens: int = 0
    achievable_prefix_tokens: int = 0
    num_rows_carried: int = 0

    def __add__(self, other: PlanTotals) -> PlanTotals:
        return PlanTotals(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class PlannedSlice:
    """One slice; `index` is its place in the prefix order of the corpus.

    path, offset, num_bytes: where its rows lie. num_rows: rows to compute, errors included. computed_tokens: prompt
    tokens to compute after the slice before. shared_with_previous: tokens that its first row has in common with the
    last row of the slice before: what an actor without that path has to compute on top. shared_within: the part of
    these that all rows of the slice have in common with it. shards: int32, numbers of the manifest's shards that it
    answers, ascending.
    """

    index: int
    path: str
    offset: int
    num_bytes: int
    num_rows: int
    prompt_tokens: int
    computed_tokens: int
    shared_with_previous: int
    shared_within: int
    shards: NDArray[np.int32]


_COLUMNS = {
    "part": np.int32,
    "offset": np.int64,
    "num_bytes": np.int32,
    "num_rows": np.int32,
    "prompt_tokens": np.int64,
    "computed_tokens": np.int64,
    "shared_with_previous": np.int32,
    "shared_within": np.int32,
}


class SliceTable(Sequence[PlannedSlice]):
    """All slices of a corpus in about 50 bytes each, and 4 per shard that it answers."""

    def __init__(
        self,
        paths: list[str],
        columns: dict[str, NDArray[np.integer]],
        shard_offsets: NDArray[np.int64],
        shards: NDArray[np.int32],
    ) -> None:
        """columns: by the names of _COLUMNS, `part` being a number of `paths`. shards: int32, those of all slices one
        after the other; shard_offsets: int64, where each slice's begin, and the end."""
        self._paths = paths
        self.columns = {name: np.asarray(columns[name], dtype) for name, dtype in _COLUMNS.items()}
        self.shard_offsets = shard_offsets
        self.shards = shards

    @classmethod
    def of(cls, slices: Sequence[PlannedSlice]) -> SliceTable:
        paths = list(dict.fromkeys(piece.path for piece in slices))
        part = {path: number for number, path in enumerate(paths)}
        columns = {
            name: np.array([part[s.path] if name == "part" else getattr(s, name) for s in slices], dtype)
            for name, dtype in _COLUMNS.items()
        }
        offsets = np.cumsum([0, *(len(piece.shards) for piece in slices)], dtype=np.int64)
        empty = np.empty(0, np.int32)
        return cls(paths, columns, offsets, np.concatenate([empty, *(s.shards for s in slices)]).astype(np.int32))

    @classmethod
    def concatenate(cls, tables: Sequence[SliceTable]) -> SliceTable:
        """The slices of several tables, numbered anew in their order."""
        first_paths = np.cumsum([0, *(len(table.paths) for table in tables)])
        columns = {
            name: np.concatenate([np.empty(0, dtype), *(table.columns[name] for table in tables)])
            for name, dtype in _COLUMNS.items()
        }
        nothing = np.empty(0, np.int32)
        columns["part"] = np.concatenate([nothing, *(t.columns["part"] + n for t, n in zip(tables, first_paths))])
        counts = np.concatenate([nothing, *(np.diff(table.shard_offsets) for table in tables)])
        return cls(
            [path for table in tables for path in table.paths],
            columns,
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.concatenate([nothing, *(table.shards for table in tables)]).astype(np.int32),
        )

    @property
    def paths(self) -> list[str]:
        return self._paths

    def __len__(self) -> int:
        return len(self.columns["part"])

    def __getitem__(self, index: int) -> PlannedSlice:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        own = {name: int(column[index]) for name, column in self.columns.items()}
        path = self._paths[own.pop("part")]
        return PlannedSlice(index=index, path=path, shards=self.shards_of(index), **own)

    def __iter__(self) -> Iterator[PlannedSlice]:
        return (self[index] for index in range(len(self)))

    def shards_of(self, index: int) -> NDArray[np.int32]:
        return self.shards[self.shard_offsets[index] : self.shard_offsets[index + 1]]

    def slices_of(self, shard: int) -> NDArray[np.int64]:
        """The slices that answer rows of this shard, ascending."""
        return np.searchsorted(self.shard_offsets, np.flatnonzero(self.shards == shard), side="right") - 1


@dataclass(frozen=True, slots=True)
class SliceRef:
    """All that a process needs to read one slice, in some 100 bytes and the names of its shards."""

    index: int
    num_slices: int
    path: str
    offset: int
    num_bytes: int
    shared_with_previous: int
    plan_id: str
    etag: str
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CorpusManifest:
    """A planned corpus.

    folder: of the plan, below the output. etag: a digest of the shards' versions. plan_id: a digest over these, the
    fingerprint and all slices' rows; equal exactly where slice `index` means the same rows. Both stand in names of
    slice objects. shards: by name. carried: what is answered, and in none of the slices.
    """

    fingerprint: str
    etag: str
    plan_id: str
    folder: str
    settings: dict[str, int]
    shards: list[PlannedShard]
    totals: PlanTotals
    slices: SliceTable
    carried: Carried = NOTHING_CARRIED

    def shard_number(self, name: str) -> int:
        return next(number for number, shard in enumerate(self.shards) if shard.name == name)

    def slice_name(self, index: int) -> SliceName:
        """The name of the slice object with the answers of slice `index`; it lies at `.path(CORPUS)`."""
        return SliceName.of_plan(index, len(self.slices), self.fingerprint, self.etag, self.plan_id)

    def owns(self, name: SliceName) -> bool:
        """Whether a slice object's name says that it holds answers of this plan."""
        return 0 <= name.index < len(self.slices) and name == self.slice_name(name.index)

    def ref(self, index: int) -> SliceRef:
        piece = self.slices[index]
        return SliceRef(
            index=index,
            num_slices=len(self.slices),
            path=piece.path,
            offset=piece.offset,
            num_bytes=piece.num_bytes,
            shared_with_previous=piece.shared_with_previous,
            plan_id=self.plan_id,
            etag=self.etag,
            shards=tuple(self.shards[number].name for number in piece.shards),
        )

    def write(self, storage: Storage) -> None:
        """Write it whole or not at all; from then on the corpus is planned."""
        offsets = pa.array(self.slices.shard_offsets, pa.int64())
        columns: dict[str, pa.Array] = {name: pa.array(column) for name, column in self.slices.columns.items()}
        columns["shards"] = pa.LargeListArray.from_arrays(offsets, pa.array(self.slices.shards, pa.int32()))
        head = {
            "manifest_version": VERSION,
            "fingerprint": self.fingerprint,
            "plan_id": self.plan_id,
            "settings": self.settings,
            "shards": [[shard.name, shard.etag, shard.num_rows] for shard in self.shards],
            "totals": asdict(self.totals),
            "paths": self.slices.paths,
            "carried": asdict(self.carried),
        }
        storage.write_whole(f"{self.folder}/{MANIFEST}", to_parquet(pa.table(columns), head))


def plan_settings(plan: PlanSection) -> dict[str, int]:
    """What of the job's plan section decides where slices end."""
    return {"slice_tokens": plan.slice_tokens, "max_rows_per_slice": plan.max_rows_per_slice}


def corpus_etag(shards: Sequence[PlannedShard]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for shard in shards:
        digest.update(f"{shard.name}\x1f{shard.etag}\x1f{shard.num_rows}\x1e".encode())
    return digest.hexdigest()


def plan_folder(
    fingerprint: str, settings: dict[str, int], shards: Sequence[PlannedShard], carried: Carried = NOTHING_CARRIED
) -> str:
    """Where the plan of these shards by this job lies; another job, cut or corpus has another folder, and so has one of
    which other rows are answered."""
    text = json.dumps([VERSION, fingerprint, settings, corpus_etag(shards), asdict(carried)], sort_keys=True)
    return f"{PLANS}/{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def planned_shards(shards: Sequence[Shard]) -> list[PlannedShard]:
    """The shards as a manifest numbers them: by name, whatever the order of doing them."""
    return [PlannedShard(s.name, s.etag, s.num_rows) for s in sorted(shards, key=lambda shard: shard.name)]


def read_manifest(storage: Storage, folder: str) -> CorpusManifest:
    """FileNotFoundError if there is none; ShardError if it cannot be read or is of another version."""
    path = f"{folder}/{MANIFEST}"
    place = public_uri(storage.uri_of(path))
    data = storage.read_bytes(path)
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
        head = json.loads(table.schema.metadata[METADATA_KEY])
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"the plan {place} cannot be read: {error}") from error
    if head.get("manifest_version") != VERSION:
        raise ShardError(f"the plan {place} is of version {head.get('manifest_version')!r}, this Shoal reads {VERSION}")
    lengths = pc.list_value_length(table["shards"]).to_numpy()
    slices = SliceTable(
        head["paths"],
        {name: table[name].to_numpy() for name in _COLUMNS},
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        pc.list_flatten(table["shards"]).to_numpy().astype(np.int32),
    )
    shards = [PlannedShard(*shard) for shard in head["shards"]]
    totals = PlanTotals(**head["totals"])
    return CorpusManifest(
        head["fingerprint"],
        corpus_etag(shards),
        head["plan_id"],
        folder,
        head["settings"],
        shards,
        totals,
        slices,
        Carried.from_json(head["carried"]),
    )


def find_manifest(
    storage: Storage, fingerprint: str, plan: PlanSection, listed: Sequence[Shard], to_do: Sequence[Shard]
) -> tuple[CorpusManifest | None, list[str]]:
    """The saved plan that holds for this job and corpus, or None; and why others that are there do not.

    listed: all shards that the input has now; to_do: those without results. A plan holds as long as all its shards are
    there unchanged, whether published meanwhile or not, none is to be done that it does not know, and the answers are
    there that it has from plans before it.
    """
    reasons = []
    for file in storage.list(PLANS):
        folder, _, name = file.path.rpartition("/")
        if name != MANIFEST:
            continue
        try:
            manifest = read_manifest(storage, folder)
        except ShardError as error:
            reasons.append(str(error))
            continue
        reason = why_not(manifest, fingerprint, plan, listed, to_do) or _what_is_missing(storage, manifest, to_do)
        if not reason:
            return manifest, reasons
        reasons.append(f"the plan {folder} is not used: {reason}")
    return None, reasons


def why_not(
    manifest: CorpusManifest, fingerprint: str, plan: PlanSection, listed: Sequence[Shard], to_do: Sequence[Shard]
) -> str:
    """Why this plan does not hold for this job and corpus; "" if it does."""
    if manifest.fingerprint != fingerprint:
        return "it is of another job"
    settings = plan_settings(plan)
    if manifest.settings != settings:
        before = ", ".join(f"plan.{key}={value}" for key, value in manifest.settings.items() if settings[key] != value)
        return f"it was made with {before}"
    now, planned = {shard.name: shard for shard in listed}, {shard.name for shard in manifest.shards}
    gone = [shard.name for shard in manifest.shards if shard.name not in now]
    changed = [s.name for s in manifest.shards if s.name in now and not s.is_still(now[s.name])]
    new = [shard.name for shard in to_do if shard.name not in planned]
    parts = [(gone, "gone"), (changed, "changed"), (new, "new")]
    return "; ".join(f"{_name_some(names)} {_is(names)} {state} since" for names, state in parts if names)


def _what_is_missing(storage: Storage, manifest: CorpusManifest, to_do: Sequence[Shard]) -> str:
    carried, names = manifest.carried, {shard.name for shard in to_do}
    needed = {one.path for one in carried.slices if not names.isdisjoint(carried.names(one.shards))}
    missing = needed.difference(list_slices(storage, CORPUS).get(CORPUS, {})) if needed else ()
    return f"{len(missing)} slices that were answered before it are gone" if missing else ""


def read_slice(storage: Storage, manifest: CorpusManifest, index: int) -> Slice:
    """Slice `index` with its rows: one request for its bytes. ShardError if they are damaged or gone."""
    return read_planned(storage, manifest.ref(index))


def read_planned(storage: Storage, ref: SliceRef) -> Slice:
    """The slice that a `CorpusManifest.ref` names."""
    place = public_uri(storage.uri_of(ref.path))
    try:
        (data,) = storage.read_ranges(ref.path, [(ref.offset, ref.offset + ref.num_bytes)])
        with pa.ipc.open_stream(data) as reader:
            rows = read_rows(reader.read_all())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ShardError(
            f"slice {ref.index} of the corpus plan cannot be read from {place} ({error}); remove {PLANS} in the output "
            "and run the same command again"
        ) from error
    # How its first row goes on from the slice before is known only when all slices are there.
    rows[0] = replace(rows[0], shared_prefix_tokens=ref.shared_with_previous)
    return Slice(
        shard=CORPUS,
        etag=ref.etag,
        index=ref.index,
        num_slices=ref.num_slices,
        rows=rows,
        plan_id=ref.plan_id,
        achievable_prefix_tokens=sum(row.shared_prefix_tokens for row in rows),
        shards=ref.shards,
    )


def _name_some(names: list[str], at_most: int = 3) -> str:
    more = len(names) - at_most
    return f"shard{'s' * (len(names) > 1)} {', '.join(names[:at_most])}" + (f" and {more} more" if more > 0 else "")


def _is(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
