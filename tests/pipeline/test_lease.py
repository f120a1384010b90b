"""The lease: one holder at a time, whoever races, dies, sleeps or comes back; in a folder, in memory and in S3."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import lease as lease_module
from pipeline.lease import FOLDER, Lease, LeaseHeld, acquire, read_holder
from pipeline.storage import Storage, StorageError

NEVER_S = 3600.0
"""A time to live that no test outlasts."""


@pytest.fixture
def bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    storage = Storage(f"s3://lease/{uuid.uuid4().hex}")
    if not storage._filesystem().exists("lease"):
        storage._filesystem().mkdir("lease")
    return storage


@pytest.fixture(params=["local", "memory", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "s3":
        yield request.getfixturevalue("bucket")
    else:
        yield Storage(str(tmp_path / "out") if request.param == "local" else f"memory://{uuid.uuid4().hex}")


class StoreClock:
    """Adds seconds to the store's times of what is written from now on, as if so much time had passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_s = 0.0
        self._shift: dict[tuple[str, str], float] = {}
        write, create, modified = Storage.write_whole, Storage.create_exclusive, Storage.modified_at

        def note(storage: Storage, path: str) -> None:
            self._shift[storage.uri, path] = self.ahead_s

        def write_whole(storage: Storage, path: str, data: bytes):
            note(storage, path)
            return write(storage, path, data)

        def create_exclusive(storage: Storage, path: str, data: bytes) -> bool:
            done = create(storage, path, data)
            if done:
                note(storage, path)
            return done

        def modified_at(storage: Storage, path: str) -> float | None:
            at = modified(storage, path)
            return None if at is None else at + self._shift.get((storage.uri, path), 0.0)

        monkeypatch.setattr(Storage, "write_whole", write_whole)
        monkeypatch.setattr(Storage, "create_exclusive", create_exclusive)
        monkeypatch.setattr(Storage, "modified_at", modified_at)


@pytest.fixture
def store_clock(monkeypatch: pytest.MonkeyPatch) -> StoreClock:
    return StoreClock(monkeypatch)


def terms(output: Storage) -> list[str]:
    return [file.path.removeprefix(f"{FOLDER}/") for file in output.list(FOLDER)]


def test_who_comes_second_is_told_who_holds_it_and_since_when(output: Storage) -> None:
    with acquire(output, "night one", ttl_s=NEVER_S) as lease:
        with pytest.raises(LeaseHeld) as refused:
            acquire(output, "night two")
        said = str(refused.value)
        assert "night one" in said and lease.holder.host in said and str(os.getpid()) in said
        assert lease.holder.started_at in said and re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d", said)
        holder = read_holder(output)
        assert holder is not None and holder.token == lease.holder.token
        assert terms(output) == ["00000001.json"], "no probe is left behind"
    assert read_holder(output) is None


def test_a_released_lease_is_taken_at_once_and_old_terms_go(output: Storage) -> None:
    for number in range(1, 4):
        with acquire(output, f"night {number}", ttl_s=NEVER_S) as lease:
            assert lease.term == number and lease.taken_from is None and not lease.is_lost
    assert terms(output) == ["00000003.json"]


def test_a_lease_that_is_not_renewed_is_taken_over_after_its_time_by_the_stores_clock(
    output: Storage, store_clock: StoreClock
) -> None:
    dead = acquire(output, "killed", ttl_s=60)
    store_clock.ahead_s = 50
    with pytest.raises(LeaseHeld):
        acquire(output, "early")
    store_clock.ahead_s = 70
    with acquire(output, "next", ttl_s=60) as lease:
        assert lease.term == 2
        assert lease.taken_from is not None and lease.taken_from.owner == "killed"
        dead.renew()
        assert dead.is_lost and not lease.is_lost
        dead.release()
        holder = read_holder(output)
        assert holder is not None and holder.owner == "next", "who has lost it releases nothing"


def test_a_renewed_lease_is_not_taken_over_and_no_local_clock_is_asked(
    output: Storage, store_clock: StoreClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = acquire(output, "alive", ttl_s=60)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # a machine whose clock is decades ahead
    for _ in range(3):
        store_clock.ahead_s += 50
        lease.renew()
        with pytest.raises(LeaseHeld):
            acquire(output, "other")
    assert not lease.is_lost


def test_a_holder_that_slept_longer_than_its_time_knows_it_before_it_has_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = acquire(Storage(str(tmp_path)), "sleeper", ttl_s=60)
    assert not lease.is_lost
    slept = lease_module.clock() + 61
    monkeypatch.setattr(lease_module, "clock", lambda: slept)
    assert lease.is_lost
    lease.renew()
    monkeypatch.undo()
    assert lease.is_lost, "and it does not come back"


def test_a_store_that_is_away_for_a_moment_costs_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lease = acquire(Storage(str(tmp_path)), "patient", ttl_s=NEVER_S)

    def refuse(*_: object) -> None:
        raise StorageError("away")

    with monkeypatch.context() as broken:
        broken.setattr(Storage, "write_whole", refuse)
        with pytest.raises(StorageError):
            lease.renew()
        assert not lease.is_lost
        lease.release()
        assert "was not released and runs out by itself" in caplog.text
    lease.renew()
    assert not lease.is_lost


def test_a_thread_renews_it_until_it_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Storage(str(tmp_path))
    monkeypatch.setattr(lease_module, "RENEWALS_PER_TTL", NEVER_S / 0.02)
    with acquire(output, "busy", ttl_s=NEVER_S):
        seen = {read_renewal(tmp_path)}
        deadline = time.monotonic() + 60
        while len(seen) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
            seen.add(read_renewal(tmp_path))
        assert len(seen) >= 4
    assert json.loads((tmp_path / FOLDER / "00000001.json").read_text())["released"] is True


def read_renewal(folder: Path) -> str:
    return str(json.loads((folder / FOLDER / "00000001.json").read_text())["renewed_at"])


def test_waiting_ends_when_it_is_released_and_says_once_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, said = Storage(str(tmp_path)), []
    held = acquire(output, "first", ttl_s=NEVER_S)
    naps = iter([lambda: None, held.release])
    monkeypatch.setattr(lease_module.time, "sleep", lambda _: next(naps)())
    assert acquire(output, "second", wait_s=NEVER_S, say=said.append).term == 2
    assert len(said) == 1 and "first" in said[0]


def test_a_term_that_is_no_lease_is_named(tmp_path: Path) -> None:
    output = Storage(str(tmp_path))
    output.write_whole(f"{FOLDER}/00000007.json", b"[1]")
    with pytest.raises(StorageError, match=r"00000007\.json is no lease .*remove it"):
        acquire(output, "x")


# --- races --------------------------------------------------------------------------------------------------------

RACER = """
import os, sys
sys.path.insert(0, {repository!r})
from pipeline.lease import LeaseHeld, acquire
from pipeline.storage import Storage
output = Storage(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    lease = acquire(output, f"racer {{os.getpid()}}", ttl_s=3600)
except LeaseHeld:
    print("refused", flush=True)
else:
    print(f"won {{lease.term}} {{lease.holder.token}}", flush=True)
"""


@pytest.mark.parametrize("is_stale", [False, True], ids=["free", "stale"])
@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_many_processes_that_race_one_wins(
    where: str, is_stale: bool, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = request.getfixturevalue("bucket") if where == "s3" else Storage(str(tmp_path / "out"))
    if is_stale:  # as a night leaves it that was killed: its time to live is over when it is written
        acquire(output, "killed", ttl_s=0.0)
    repository = str(Path(lease_module.__file__).parents[1])
    command = [sys.executable, "-c", RACER.format(repository=repository), output.uri]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(6)
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline().strip() == "ready"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=120)[0].split() for racer in racers]
    (winner,) = [words for words in said if words[0] == "won"]
    assert sum(words == ["refused"] for words in said) == 5, said
    holder = read_holder(output)
    assert holder is not None and holder.token == winner[2]


def test_of_threads_that_take_over_stale_leases_again_and_again_one_wins_each_time(tmp_path: Path) -> None:
    """Every winner's term is stale at once, so all others may take it over; but each term has one owner only."""
    output, won = Storage(str(tmp_path)), []

    def race(number: int) -> None:
        for _ in range(10):
            # A term that is stale at once may also be gone before its writer has read it back, and is nobody's then.
            taken = None
            while taken is None:
                with contextlib.suppress(StorageError):
                    taken = acquire(output, f"racer {number}", ttl_s=0.0)
            won.append(taken.term)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(race, range(6)))
    assert len(won) == len(set(won)) == 60
    assert len(terms(output)) < 60, "old terms go"


def interleave(monkeypatch: pytest.MonkeyPatch, method: str, when: str, action) -> None:
    """Do `action` once, just before the first call of a Storage method on a path that ends in `when`."""
    original = getattr(Storage, method)
    pending = [action]

    def call(storage: Storage, path: str = "", *rest):
        if path.endswith(when) and pending:
            pending.pop()()
        return original(storage, path, *rest)

    monkeypatch.setattr(Storage, method, call)


def test_a_holder_that_renews_between_the_look_and_the_taking_keeps_its_lease(
    tmp_path: Path, store_clock: StoreClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Storage(str(tmp_path))
    slow = acquire(output, "slow", ttl_s=60)
    store_clock.ahead_s = 61
    interleave(monkeypatch, "create_exclusive", "00000002.json", slow.renew)
    with pytest.raises(LeaseHeld, match="slow"):
        acquire(output, "taker")
    slow.renew()
    assert not slow.is_lost and terms(output) == ["00000001.json"]


def test_a_holder_that_renews_after_the_taking_finds_out_at_once(
    tmp_path: Path, store_clock: StoreClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, taken = Storage(str(tmp_path)), []
    slow = acquire(output, "slow", ttl_s=60)
    store_clock.ahead_s = 61
    # The renewal has read its term and is about to write it when another takes over.
    interleave(
        monkeypatch, "write_whole", "00000001.json", lambda: taken.append(acquire(output, "taker", ttl_s=NEVER_S))
    )
    slow.renew()
    (taker,) = taken
    assert isinstance(taker, Lease)
    taker.renew()
    assert slow.is_lost and not taker.is_lost


def test_a_taker_so_slow_that_its_number_was_used_and_removed_does_not_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Storage(str(tmp_path))
    acquire(output, "killed", ttl_s=0.0)

    def others_go_by() -> None:
        with acquire(output, "second", ttl_s=NEVER_S):
            pass
        acquire(output, "third", ttl_s=NEVER_S)

    interleave(monkeypatch, "create_exclusive", "00000002.json", others_go_by)
    with pytest.raises(LeaseHeld, match="third"):
        acquire(output, "slow")
    assert terms(output) == ["00000003.json"]


def test_where_a_store_lets_two_create_a_term_the_first_to_renew_finds_out(tmp_path: Path) -> None:
    output = Storage(str(tmp_path))
    first = acquire(output, "first", ttl_s=NEVER_S)
    output.remove(f"{FOLDER}/00000001.json")
    second = acquire(output, "second", ttl_s=NEVER_S)
    first.renew()
    second.renew()
    assert first.is_lost and not second.is_lost


def test_a_killed_holder_releases_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[2])\n"
        "from pipeline.lease import acquire; from pipeline.storage import Storage\n"
        "with acquire(Storage(sys.argv[1]), 'doomed', ttl_s=3600):\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    repository = str(Path(lease_module.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), repository], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline().strip() == "held"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    holder = read_holder(Storage(str(tmp_path)))
    assert holder is not None and holder.owner == "doomed" and holder.pid == process.pid
