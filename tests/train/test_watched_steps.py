"""When a run evaluates without eval.interval."""

from __future__ import annotations

from pst_ds.config.toml import load_run
from pst_ds.core.schedule import CubicSchedule, OneShotSchedule
from pst_ds.train.evaluate import watched_steps


def _run(*settings):
    return load_run("tests/data/world_size.toml", settings)


def test_a_run_is_watched_under_its_final_masks_if_that_is_cheap():
    run, ramp = _run("train.batch_size=10"), CubicSchedule(num_steps=100, cooldown_fraction=0.3)
    assert watched_steps(run, None, 100, 300, 25) == {20, 40, 60, 80}
    assert watched_steps(run, OneShotSchedule(0.5), 100, 300, 25) == {20, 40, 60, 80}
    assert watched_steps(run, ramp, 100, 300, 25) == {70, 77, 85, 92}
    assert watched_steps(run, None, 100, 300, 60) == {33, 66}
    for steps, evaluated in ((100, 70), (100, 37), (5000, 100), (100, 60)):
        found = watched_steps(run, None, steps, 300, evaluated)
        assert len(found) * evaluated / 3 <= 0.05 * steps * 10


def test_a_run_is_not_watched_where_there_is_nothing_to_see():
    run = _run("train.batch_size=10")
    assert watched_steps(run, None, 100, 1000, 10) == set()  # read once
    assert watched_steps(run, None, 100, 300, 0) == set()
    assert watched_steps(run, None, 100, 300, 90) == set()  # one evaluation alone would be cheap enough
    for interval in (5, -1):
        assert watched_steps(_run(f"eval.interval={interval}"), None, 1000, 300, 10) == set()
