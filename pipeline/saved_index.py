"""What drafters have learnt from a corpus' answers, kept below `_drafts/` for a resumed run or the next nightly one.

One file per worker, written whole, read by every worker that starts. It is a cache: it changes speed only, whatever is
wrong with it costs a note and never a row, and it may be removed at any time. Knows no Ray and no format: the bytes are
the engine's own, which checks them. Used by `slice_runner`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable

from actors.config import SpeculativeConfig
from actors.requests import EngineError
from pipeline.answering import Worker
from pipeline.storage import FileInfo, Storage, StorageError

logger = logging.getLogger(__name__)

DRAFTS = "_drafts"
SAVE_EVERY_S = 30.0
MAX_SAVING_SHARE = 0.05
"""Of a worker's time, after its first FREE_SAVING_S: where pauses are many and the index is large, not all are used."""

FREE_SAVING_S = 2.0

STALE_S = 600.0
"""A file of this run that nobody has written for so long may go once its content is in another."""

FILE_SHARE = 0.25
"""Of `corpus_index_bytes`, for files. In memory an index takes ten times the room, and to merge 6 MB took 0.7 s."""

METHODS_WITH_INDEX = ("auto", "corpus", "combined")


class SavedIndex:
    """One worker's file, and what it reads of the others'. Blocks on storage and on the engine: for threads.

    At most FILE_SHARE of `corpus_index_bytes` is read, from the newest files, and as much written. Files of other runs
    go once this worker's own, which then holds what they held, is written; two runs at once over one output would take
    them from each other.
    """

    def __init__(
        self,
        output: Storage,
        run: str,
        worker: str,
        config: SpeculativeConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.notes: list[str] = []
        self._output = output
        self._run = run
        self._path = f"{DRAFTS}/{run}-{worker}.index"
        self._is_used = config.method in METHODS_WITH_INDEX
        self._max_bytes = int(FILE_SHARE * config.corpus_index_bytes)
        self._clock = clock
        self._started_at = self._saved_at = clock()
        self._saving_s = 0.0
        self._written = b""
        self._others: dict[str, tuple[str, float]] = {}  # path -> etag, and when it was seen

    def load_into(self, worker: Worker) -> None:
        """Give a new worker what lies there; nothing at all is no mistake."""
        if not self._is_used:
            return
        try:
            if worker.export_corpus_index() is None:
                return
            files = self._list()
            unusable = [file.path for file in self._newest(files) if not self._load(worker, file)]
        except (StorageError, OSError, EngineError) as error:
            self._note(f"saved indexes of answers could not be read: {error}")
            return
        self._others = {file.path: (file.etag, self._clock()) for file in files if file.path != self._path}
        if unusable:
            self._note(
                f"{len(unusable)} saved indexes of answers are broken or of another tokenizer, and were not used: "
                + ", ".join(unusable)
            )

    def is_due(self, *, is_idle: bool) -> bool:
        """Whether to save now: at a pause, else twice a minute; and never for more than its share of the time."""
        now = self._clock()
        has_time = self._saving_s <= FREE_SAVING_S + MAX_SAVING_SHARE * (now - self._started_at)
        return self._is_used and has_time and (is_idle or now - self._saved_at >= SAVE_EVERY_S)

    def save_from(self, worker: Worker) -> None:
        """Write what the worker's engine knows, and remove the files of workers that are gone."""
        started = self._clock()
        try:
            data = worker.export_corpus_index()
            if data is not None:
                self._write(data)
        except EngineError:
            pass  # the engine broke, which whoever waits for its answers is told
        except Exception as error:  # a cache, again
            self._note(f"the index of answers could not be saved: {error}")
        self._saved_at = self._clock()
        self._saving_s += self._saved_at - started

    def _list(self) -> list[FileInfo]:
        return [file for file in self._output.list(DRAFTS) if file.path.endswith(".index")]

    def _newest(self, files: list[FileInfo]) -> list[FileInfo]:
        """As many as fit, the newest of them last, so that it weighs most. A run's name begins with its time."""
        chosen: list[FileInfo] = []
        num_bytes = 0
        for file in sorted(files, key=lambda file: file.path, reverse=True):
            num_bytes += file.size_bytes
            if num_bytes > self._max_bytes:
                break
            chosen.append(file)
        return chosen[::-1]

    def _load(self, worker: Worker, file: FileInfo) -> bool:
        try:
            data = self._output.read_bytes(file.path)
        except FileNotFoundError:
            return True  # another worker has taken it over meanwhile
        try:
            return worker.import_corpus_index(data)
        except Exception:  # a cache: whatever is wrong with it must not fail rows
            logger.warning("%s could not be loaded", file.path, exc_info=True)
            return False

    def _write(self, data: bytes) -> None:
        digest = hashlib.blake2b(data).digest()
        if digest == self._written:
            return
        if len(data) > self._max_bytes:
            self._note(
                f"the index of answers was not saved: it has {len(data)} bytes, and a quarter of "
                f"engine.speculative_config.corpus_index_bytes, {self._max_bytes}, may be written; raise it"
            )
            return
        self._output.write_whole(self._path, data)
        self._written = digest
        for path in [path for path, (etag, seen_at) in self._others.items() if self._is_gone(path, etag, seen_at)]:
            self._output.remove(path)
            del self._others[path]

    def _is_gone(self, path: str, etag: str, seen_at: float) -> bool:
        if not path.startswith(f"{DRAFTS}/{self._run}-"):
            return True
        if self._clock() - seen_at < STALE_S:
            return False
        info = self._output.info(path)
        return info is None or info.etag == etag

    def _note(self, text: str) -> None:
        """Once: a store that is away is away for every save."""
        if text not in self.notes:
            logger.warning(text)
            self.notes.append(text)
