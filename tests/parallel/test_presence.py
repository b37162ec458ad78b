"""Signs of life between threads that play ranks: a rank that falls silent is named once, and one that leaves never."""

from __future__ import annotations

import threading
import time

import pytest

from pst_ds.parallel import presence, stop_signals
from pst_ds.parallel.presence import Presence

WAIT_SECONDS = 10.0


class SharedStore:
    """A store of threads. A rank in ``cut`` waits in it without end, as on a host whose link is cut."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.cut: set[int] = set()

    def of(self, rank: int) -> Connection:
        return Connection(self, rank)


class Connection:
    def __init__(self, store: SharedStore, rank: int) -> None:
        self._store = store
        self._rank = rank

    def _reach(self) -> dict[str, bytes]:
        while self._rank in self._store.cut:
            time.sleep(0.01)
        return self._store.values

    def set(self, key: str, value: str | bytes) -> None:
        self._reach()[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str) -> bytes:
        return self._reach()[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self._reach() for key in keys)


class Ranks:
    def __init__(self, count: int) -> None:
        self.store = SharedStore()
        self.reasons: dict[int, str] = {}
        self.ranks = [
            Presence(rank, count, lambda rank=rank: self.store.of(rank), self.end(rank)) for rank in range(count)
        ]

    def end(self, rank: int):
        return lambda reason: self.reasons.setdefault(rank, reason)

    def wait_for_ends(self, count: int) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while len(self.reasons) < count and time.monotonic() < deadline:
            time.sleep(0.01)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(presence, "PERIOD_SECONDS", 0.05)
    monkeypatch.setattr(presence, "LOST_SECONDS", 1.0)
    monkeypatch.setattr(presence, "START_SECONDS", 3.0)


def test_a_lost_rank_is_named_once_and_all_ranks_end(fast):
    ranks = Ranks(4)
    time.sleep(0.5)
    ranks.store.cut.add(2)
    ranks.wait_for_ends(4)
    assert ranks.reasons.keys() == {0, 1, 2, 3}
    said = {rank for rank, reason in ranks.reasons.items() if reason}
    assert said == {1, 2}  # the rank before the lost one, and the lost one, which does not reach the store
    assert "no sign of life of rank 2 on " in ranks.reasons[1]
    ranks.store.cut.clear()


def test_ranks_that_live_and_then_leave_are_not_lost(fast):
    ranks = Ranks(3)
    time.sleep(1.5)
    ranks.ranks[1].close()
    time.sleep(1.5)
    assert ranks.reasons == {}
    for rank in ranks.ranks:
        rank.close()


def test_a_rank_that_never_comes_is_lost_after_longer(fast):
    reasons: list[str] = []
    ended = threading.Event()

    def end(reason: str) -> None:
        reasons.append(reason)
        ended.set()

    began = time.monotonic()
    Presence(0, 2, lambda: SharedStore().of(0), end)
    assert ended.wait(WAIT_SECONDS)
    assert time.monotonic() - began > 2.0
    assert "no sign of life of rank 1 in the store for 3 s" in reasons[0]


def test_a_rank_cut_off_after_all_have_met_and_before_a_first_sign_ends_as_soon_as_any(fast):
    store = SharedStore()
    store.cut.add(0)
    ended = threading.Event()
    alone = Presence(0, 2, lambda: store.of(0), lambda reason: ended.set())
    began = time.monotonic()
    alone.all_have_met()
    assert ended.wait(WAIT_SECONDS)
    assert time.monotonic() - began < presence.START_SECONDS
    store.cut.clear()


@pytest.mark.parametrize(
    ("code", "restarts", "local_rank", "ends"),
    [(2, "20", "0", True), (2, "20", "1", False), (2, "0", "0", False), (75, "20", "0", False)],
)
def test_torchrun_is_asked_to_end_after_bad_input_alone(monkeypatch, code, restarts, local_rank, ends):
    sent = []
    monkeypatch.setattr(stop_signals.os, "kill", lambda pid, number: sent.append(pid))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    stop_signals.end_elastic_torchrun(code)
    assert sent == ([stop_signals.os.getppid()] if ends else [])
