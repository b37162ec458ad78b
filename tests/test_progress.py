"""Progress goes to stderr alone: a plain line now and then, or a bar on a terminal that is wiped at the end."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tqdm.utils import disp_len

from pst_ds import progress
from pst_ds.progress import Progress
from tests.pairs import every_pair

ROOT = Path(__file__).resolve().parent.parent


class _Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.delenv("RANK", raising=False)
    return clock


def _work(clock):
    with Progress("export", 4_000_000_000, "bytes") as shown:
        for block in range(4):
            clock.now += 6
            shown.add(1_000_000_000, f"block {block}")


def test_off_a_terminal_it_is_a_line_in_ten_seconds(clock, capsys):
    _work(clock)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "export 2.00/4.00 GB | 167 MB/s | eta 0m12s | block 1",
        "export 4.00/4.00 GB | 167 MB/s | eta 0m00s | block 3",
    ]


def test_short_work_says_nothing(clock, capsys):
    with Progress("export", 10, "bytes") as shown:
        clock.now += 5
        shown.add(10)
    assert capsys.readouterr() == ("", "")


def test_the_end_is_reckoned_from_where_the_work_began(clock, capsys):
    shown = Progress("step", 100, done=40, line_seconds=0.0)
    clock.now += 60
    shown.at(50, "loss 2.3")
    shown.say("saved")
    clock.now += 21600
    shown.at(70)
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 50/100 | eta 5m00s | loss 2.3",  # 10 steps took a minute, and 50 are left
        "saved",
        "step 70/100 | eta 6h01m",
    ]


def test_more_than_the_total_is_at_its_end(clock, capsys):
    with Progress("count", 100, "bytes", line_seconds=0.0) as shown:
        clock.now += 3600
        shown.add(300)
    assert capsys.readouterr().err.endswith(" | eta 0m00s\n")


@every_pair
@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("note", ["loss 0.4613 | sparsity 0.8722 | " * 3, "層" * 70], ids=["numbers", "wide"])
def test_a_long_note_is_cut_and_leaves_bar_and_end(clock, capsys, monkeypatch, width, note):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_columns", lambda: width)
    with Progress("step", 620) as shown:
        clock.now += 100
        shown.at(400, note)
    frames = [frame for frame in capsys.readouterr().err.split("\r") if "eta" in frame]
    assert re.match(r"step █{15}.? {8,9} 400/620 \| eta 0m55s \| [^ ]", frames[0])  # 15.5 of 24 are done
    assert width - 3 <= disp_len(frames[0].rstrip()) <= width


def test_of_work_inside_other_work_only_the_outer_is_shown(clock, capsys):
    for _ in range(2):  # and once the outer one is done, another may be
        with Progress("train", 2, "steps", line_seconds=0.0) as outer:
            with Progress("evaluate", 5, "batches", line_seconds=0.0) as inner:
                inner.add(5)
                inner.say("from within")
            outer.add(1)
    assert capsys.readouterr().err == "train 1/2 steps | eta 0m00s\n" * 2


@pytest.mark.parametrize("rank", ["1", "0", "", "x"])
def test_rank_0_alone_speaks(clock, capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    with Progress("evaluate", 2, "batches", line_seconds=0.0) as shown:
        shown.add(1)
    assert bool(capsys.readouterr().err) == (rank != "1")


def test_quiet_says_nothing_even_on_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "quiet", True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("evaluate", 2, "batches", line_seconds=0.0) as shown:
        shown.add(1)
        shown.say("saved")
    assert capsys.readouterr() == ("", "")


def test_an_error_wipes_the_bar_and_lets_others_be_shown(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")

    def broken():
        with Progress("prune", 2, "blocks") as shown:
            shown.add(1)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert re.search(r"\r +\r$", capsys.readouterr().err)
    assert progress._outermost is None


SCRIPT = """
import sys
from pst_ds import progress
from pst_ds.progress import Progress
progress.DRAW_SECONDS = 0.0
with Progress("export", 3, "blocks") as shown:
    shown.add(1, "[first] block")
    shown.say("saved [it]")
    print("for a program")
    shown.add(2)
print("done", file=sys.stderr)
"""


def _on_terminal(term, columns=100):
    """(what a terminal was told, what stdout, a pipe, holds) of SCRIPT."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    command = [sys.executable, "-c", SCRIPT]
    environ = {**os.environ, "TERM": term}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=theirs, env=environ, cwd=ROOT, text=True, timeout=60, check=True
    )
    os.close(theirs)
    told = b""
    try:
        while block := os.read(ours, 65536):
            told += block
    except OSError:  # Linux's end of a terminal that no one holds
        pass
    os.close(ours)
    return told.decode(), done.stdout


@pytest.mark.parametrize("columns", [100, 0])  # 0 is what a terminal has that nobody gave a size
def test_a_terminal_has_a_bar_with_what_is_said_above_it(columns):
    told, stdout = _on_terminal("xterm", columns)
    assert stdout == "for a program\n"
    lines = re.split(r"[\r\n]+", told)
    bars = [line.rstrip() for line in lines if line.startswith("export ")]
    assert bars[0].endswith("  0/3 blocks")
    assert bars[-1].startswith(f"export {'█' * 24} 3/3 blocks")
    assert "saved [it]" in lines
    assert told.index("saved [it]") < told.rindex("export ")
    assert re.search(r"\r +\rdone\s*$", told)  # where the bar was
    assert "\x1b" not in told


def test_a_dumb_terminal_has_plain_lines():
    told, _ = _on_terminal("dumb")
    assert told.split() == ["saved", "[it]", "done"]
