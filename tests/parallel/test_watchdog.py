"""Which rank a stalled run blames."""

from __future__ import annotations

import sys
import threading
import time
import traceback

import pytest

from pst_ds.parallel import ranks, watchdog
from pst_ds.parallel.watchdog import VERDICT_FILE, StallReport, blamed_hosts, verdict_of


def _report(rank, *, beats=9, waits=True, doing="batch 3"):
    return StallReport(rank, f"host{rank}", 100 + rank, doing, beats, waits, "stack")


@pytest.mark.parametrize(
    ("reports", "world", "said"),
    [
        ([_report(0), _report(2)], 4,
         "rank 1 (host1), 3 (host3) gave no sign of life: its process is stopped, or its host is down"),
        ([_report(0), _report(1, beats=8, waits=False)], 2,
         "rank 1 (host1, pid 101) hangs in batch 3, and the others wait for it"),
        ([_report(0, waits=False), _report(1, beats=8, waits=False)], 2, "rank 1 (host1, pid 101) hangs in batch 3,"),
        ([_report(0, beats=8), _report(1)], 2, "every rank waits for another: the network between them is cut"),
        ([_report(0, waits=False)], 1, "rank 0 (host0, pid 100) hangs in batch 3. Continue"),
    ],
)  # fmt: skip
def test_the_rank_to_look_at_is_named(reports, world, said):
    text = verdict_of(reports, [f"host{i}" for i in range(world)]).message(12.0)
    assert text.startswith("pst-ds train: StalledError: no progress for 12 seconds (train.stall_timeout_seconds): ")
    assert said in text
    assert text.endswith("Continue from the newest checkpoint with --resume")


def test_the_hosts_to_leave_out_can_be_read_back(tmp_path):
    hosts = ["node0", "node0", "node1", "node1"]
    assert blamed_hosts(tmp_path) == []
    verdict_of([_report(0), _report(1)], hosts).write(tmp_path)
    assert blamed_hosts(tmp_path) == ["node1"]
    verdict_of([_report(i) for i in range(4)], hosts).write(tmp_path)
    assert blamed_hosts(tmp_path) == []
    verdict_of([_report(0), _report(2)], [""] * 4).write(tmp_path)  # hosts that nobody knows
    assert blamed_hosts(tmp_path) == []
    (tmp_path / VERDICT_FILE).write_text('{"hosts": 3}')
    assert blamed_hosts(tmp_path) == []


def _stack(name, filename):
    return traceback.StackSummary.from_list([("loop.py", 1, "train", ""), (filename, 2, name, "")])


@pytest.mark.parametrize(
    ("name", "filename", "waits"),
    [
        ("all_reduce", "/x/torch/distributed/distributed_c10d.py", True),
        ("all_gather", "/x/deepspeed/comm/comm.py", True),
        ("wait", "/x/deepspeed/runtime/zero/partition_parameters.py", True),
        ("wait", "/x/threading.py", False),
        ("forward", "/x/deepspeed/runtime/engine.py", False),
    ],
)
def test_a_stack_shows_whether_it_waits_for_others(name, filename, waits):
    assert watchdog._waits(_stack(name, filename)) is waits


class _Ended(Exception):
    pass


def _watch(monkeypatch, folder, timeout, beats):
    """Exit codes of a watchdog whose main thread makes the given number of beats, then waits for it."""
    codes, ended = [], threading.Event()

    def end(code):
        codes.append(code)
        ended.set()
        raise _Ended  # ends the thread

    monkeypatch.setattr(watchdog.os, "_exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with watchdog.watching(folder, timeout):
        for i in range(beats):
            watchdog.heartbeat(f"part {i}")
        ended.wait(30)
    return codes


def test_a_process_that_no_longer_gets_on_is_ended(tmp_path, monkeypatch, capsys):
    assert _watch(monkeypatch, tmp_path / "stalls", 0.05, beats=3) == [1]
    said = capsys.readouterr().err
    assert "made no progress for 0.05 seconds in part 2, not waiting for other ranks" in said
    assert "hangs in part 2. Continue" in said
    assert "ended.wait(30)" in said  # the stack
    assert sorted(path.name for path in (tmp_path / "stalls").iterdir()) == ["rank-0.json", VERDICT_FILE]


def test_a_rank_stays_until_the_verdict_was_said(tmp_path, monkeypatch, capsys):
    """One that left before would cut off the rank that is about to say it."""
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    waited_for = []
    files = watchdog._files

    def noted(folder, pattern, count, seconds):
        waited_for.append((pattern, count, seconds > 0))
        return files(folder, pattern, count, seconds)

    monkeypatch.setattr(watchdog, "_files", noted)
    watchdog._write(tmp_path, _report(0))
    assert _watch(monkeypatch, tmp_path, 0.05, beats=1) == [1]
    assert waited_for == [("rank-*.json", 2, True), (VERDICT_FILE, 1, True)]
    assert "StalledError" not in capsys.readouterr().err


def test_waiting_for_the_verdict_ends_with_it_or_with_time(tmp_path):
    start = time.monotonic()
    assert watchdog._files(tmp_path, "said", 1, 0.1) == []
    assert time.monotonic() - start >= 0.1
    (tmp_path / "said").touch()
    assert watchdog._files(tmp_path, "said", 1, 1e9) == [tmp_path / "said"]


def test_a_process_that_gets_on_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: pytest.fail("ended"))
    with watchdog.watching(tmp_path, 0.2):
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            watchdog.heartbeat("work")
    assert list(tmp_path.iterdir()) == []
    assert watchdog._current is None


def test_no_timeout_watches_nothing(tmp_path):
    before = threading.active_count()
    with watchdog.watching(tmp_path, 0):
        assert threading.active_count() == before
        watchdog.heartbeat("work")


def test_it_can_be_imported_where_stderr_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "__stderr__", None)
    with watchdog.watching(tmp_path, 30):
        watchdog.heartbeat("work")
