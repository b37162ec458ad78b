"""A control group limits what is started in it and says what it had; where one may be made."""

from __future__ import annotations

import os
import sys

import pytest

from tools.bench.fits import Need, Outcome, line
from tools.bench.memory_cgroup import MemoryCgroup

TAKES_200_MB = "block = bytearray(b'1') * (200 << 20)"


@pytest.mark.cluster
@pytest.mark.parametrize(("limit", "is_killed"), [(100 << 20, True), (400 << 20, False)])
def test_a_limit_kills_who_takes_more(tmp_path, limit, is_killed):
    try:
        group = MemoryCgroup(f"pst-ds-test-{os.getpid()}", limit)
    except OSError as error:
        pytest.skip(f"no control group of memory can be made here: {error}")
    try:
        process = group.start([sys.executable, "-c", TAKES_200_MB], dict(os.environ), tmp_path / "log")
        code = process.wait(60)
        assert (code != 0, group.kills > 0) == (is_killed, is_killed)
    finally:
        group.close()


def test_a_line_says_what_was_planned_and_how_each_run_ended():
    outcomes = [Outcome(800_000_000, [0, 0], 0, 750_000_000), Outcome(600_000_000, [-9, 1], 1, 600_000_000)]
    said = line(Need(400_000_000, 800_000_000, 640_000_000), outcomes)
    assert "planned peak 400 MB, enough 800; under 800 it trains, at most 750" in said
    assert "under 600 it is killed, at most 600" in said
