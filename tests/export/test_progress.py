"""Progress goes to stderr alone: a line now and then, or one that a terminal rewrites."""

from __future__ import annotations

import sys

import pytest

from pst_ds.export import progress
from pst_ds.export.progress import Progress


class _Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def _work(clock):
    with Progress("export", 4_000_000_000) as shown:
        for _ in range(4):
            clock.now += 6
            shown.add(1_000_000_000)


def test_off_a_terminal_it_is_a_line_in_ten_seconds(clock, capsys):
    _work(clock)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "export: 2.00 of 4.00 GB (50%), 167 MB/s, 12 s left",
        "export: 4.00 of 4.00 GB (100%), 167 MB/s, 0 s left",
    ]


def test_on_a_terminal_one_line_is_rewritten_and_then_wiped(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _work(clock)
    said = capsys.readouterr().err
    assert "\n" not in said
    assert said.count("\r") == 4 + 1
    assert said.endswith("\r\x1b[K")


def test_short_work_says_nothing(clock, capsys):
    with Progress("export", 10) as shown:
        clock.now += 5
        shown.add(10)
    assert capsys.readouterr() == ("", "")
