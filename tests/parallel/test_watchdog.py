"""Ends a stalled run, together with the other ranks."""

from __future__ import annotations

import sys
import threading
import time

import pytest

from pst_ds.parallel import watchdog
from pst_ds.parallel.stall_verdict import VERDICT_FILE


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
    assert "seconds in part 2, not in a collective" in said
    assert "hangs in part 2. Continue" in said
    assert "ended.wait(30)" in said  # the stack
    assert sorted(path.name for path in (tmp_path / "stalls").iterdir()) == [VERDICT_FILE]


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
