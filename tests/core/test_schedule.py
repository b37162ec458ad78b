"""Sparsity schedules: pure functions that end exactly, on a grid of updates."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.schedule import CubicSchedule, OneShotSchedule, Schedules


@st.composite
def cubic_schedules(draw) -> CubicSchedule:
    final = draw(st.floats(0.0, 0.99))
    warmup = draw(st.floats(0.0, 0.98))
    return CubicSchedule(
        final_sparsity=final,
        initial_sparsity=draw(st.floats(0.0, final)),
        num_steps=draw(st.integers(1, 120)),
        warmup_fraction=warmup,
        cooldown_fraction=draw(st.floats(0.0, 0.99 - warmup)),
        update_interval=draw(st.integers(1, 40)),
    )


def update_steps(schedule, num_steps: int) -> list[int]:
    return [step for step in range(num_steps + 1) if schedule.updates_masks_at(step)]


def test_written_out_ramp():
    """100 steps: warm-up to 10, ramp to 70, cool-down; halfway (1 - 1/2)^3 = 1/8 is left."""
    schedule = CubicSchedule(final_sparsity=0.8, num_steps=100, update_interval=1)
    assert (schedule.ramp_start, schedule.ramp_end) == (10, 70)
    assert [schedule.sparsity_at(s) for s in (0, 5, 10)] == [0.0] * 3
    assert schedule.sparsity_at(40) == pytest.approx(0.8 * 7 / 8, rel=1e-15)
    assert schedule.sparsity_at(25) == pytest.approx(0.8 * (1 - 0.75**3), rel=1e-15)
    assert [schedule.sparsity_at(s) for s in (70, 71, 100, 10**9)] == [0.8] * 4


def test_the_first_and_last_update_are_the_ends_of_the_ramp():
    schedule = CubicSchedule(final_sparsity=0.5, num_steps=100, update_interval=1)
    assert update_steps(schedule, 100) == list(range(11, 71))
    assert not schedule.is_final(69)
    assert schedule.is_final(70)


def test_updates_lie_on_the_interval_grid_and_at_the_end():
    schedule = CubicSchedule(final_sparsity=0.5, num_steps=100, update_interval=16)
    assert update_steps(schedule, 100) == [26, 42, 58, 70]
    assert [schedule.sparsity_at(s) for s in range(26, 42)] == [schedule.sparsity_at(26)] * 16
    assert schedule.sparsity_at(69) == schedule.sparsity_at(58) < schedule.sparsity_at(70) == 0.5


def test_an_interval_longer_than_the_ramp_updates_once():
    schedule = CubicSchedule(final_sparsity=0.5, num_steps=100, update_interval=1000)
    assert update_steps(schedule, 100) == [70]


def test_initial_sparsity_is_set_before_the_first_step():
    schedule = CubicSchedule(final_sparsity=0.7, initial_sparsity=0.1, num_steps=100)
    assert schedule.updates_masks_at(0)
    assert not CubicSchedule(final_sparsity=0.7, num_steps=100).updates_masks_at(0)
    assert [schedule.sparsity_at(s) for s in (0, 7, 10)] == [0.1] * 3  # 0.7 + (0.1 - 0.7) is below 0.1


def test_layers_with_a_sparsity_of_their_own_ramp_where_the_others_stay_dense():
    """1 - (1 - progress)^3 of the way to it, as the others would with a final sparsity above 0."""
    dense = CubicSchedule(final_sparsity=0.0, num_steps=100, update_interval=16)
    assert update_steps(dense, 100) == [26, 42, 58, 70]
    assert {dense.sparsity_at(s) for s in range(101)} == {0.0}
    assert [dense.progress_at(s) for s in (0, 10, 25)] == [0.0] * 3
    assert [dense.progress_at(s) for s in (26, 41)] == pytest.approx([1 - (44 / 60) ** 3] * 2, rel=1e-15)
    assert [dense.progress_at(s) for s in (70, 100)] == [1.0] * 2
    sparse = dataclasses.replace(dense, final_sparsity=0.7)
    for step in range(101):
        assert dense.updates_masks_at(step) == sparse.updates_masks_at(step)
        assert dense.progress_at(step) == pytest.approx(sparse.progress_at(step), abs=1e-15)


def test_solves_are_evenly_spaced_on_the_ramp_and_hold_its_sparsity():
    """Dense before the first; the 16 batches before each are listened to, from the solve before on if it is nearer."""
    ramp = {"final_sparsity": 0.9, "initial_sparsity": 0.6, "num_steps": 100, "warmup_fraction": 0.2}
    schedule = CubicSchedule(**ramp, cooldown_fraction=0.3, solves=3)
    assert update_steps(schedule, 101) == [37, 54, 70]
    assert {schedule.sparsity_at(s) for s in range(37)} == {0.0}
    assert [schedule.sparsity_at(s) for s in (37, 53, 54, 70, 99)] == pytest.approx(
        [0.9 - 0.3 * left**3 for left in (33 / 50, 33 / 50, 16 / 50, 0, 0)], rel=1e-15
    )
    assert not schedule.is_final(69)
    assert schedule.is_final(70)
    schedules = Schedules(schedule)
    assert [s for s in range(100) if schedules.listens_at(s)] == [*range(21, 37), *range(38, 70)]
    assert [schedules.last_solve(s) for s in (0, 36, 37, 53, 69, 70, 100)] == [0, 0, 37, 37, 54, 70, 70]
    assert Schedules(CubicSchedule(**ramp)).last_solve(100) == 0
    assert not Schedules(OneShotSchedule(0.5)).listens_at(0)


@given(schedule=cubic_schedules())
def test_monotone_from_the_initial_to_exactly_the_final_sparsity(schedule):
    path = [schedule.sparsity_at(step) for step in range(schedule.num_steps + 2)]
    assert path == sorted(path)
    assert path[0] == schedule.initial_sparsity
    assert path[schedule.num_steps] == schedule.final_sparsity
    assert 0 <= schedule.ramp_start < schedule.ramp_end <= schedule.num_steps


@given(schedule=cubic_schedules())
def test_sparsity_moves_only_where_masks_are_updated(schedule):
    for step in range(1, schedule.num_steps + 2):
        if schedule.sparsity_at(step) != schedule.sparsity_at(step - 1):
            assert schedule.updates_masks_at(step)


@given(schedule=cubic_schedules())
def test_masks_are_fixed_once_final(schedule):
    for step in range(schedule.num_steps + 2):
        assert schedule.is_final(step) == (step >= schedule.ramp_end)
        if schedule.is_final(step):
            assert schedule.sparsity_at(step) == schedule.final_sparsity
            assert not schedule.updates_masks_at(step + 1)
    assert schedule.updates_masks_at(schedule.ramp_end)


@given(schedule=cubic_schedules())
def test_progress_is_the_share_of_the_final_sparsity_and_ends_at_one(schedule):
    path = [schedule.progress_at(step) for step in range(schedule.num_steps + 2)]
    assert path == sorted(path)
    assert path[schedule.ramp_end :] == [1.0] * len(path[schedule.ramp_end :])
    if schedule.final_sparsity:
        assert path == [schedule.sparsity_at(s) / schedule.final_sparsity for s in range(len(path))]
    for step in range(1, len(path)):
        if path[step] != path[step - 1]:
            assert schedule.updates_masks_at(step)


@given(schedule=cubic_schedules(), steps=st.lists(st.integers(0, 130), max_size=20))
def test_pure_function_of_the_step(schedule, steps):
    """Asking in any order, or of a copy, gives the same answers: nothing to save on resume."""
    asked = [(schedule.sparsity_at(s), schedule.updates_masks_at(s), schedule.is_final(s)) for s in steps]
    copy = dataclasses.replace(schedule)
    again = [(copy.sparsity_at(s), copy.updates_masks_at(s), copy.is_final(s)) for s in reversed(steps)]
    assert asked == again[::-1]
    assert copy == schedule
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.num_steps = 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"final_sparsity": 1.0}, r"final_sparsity = 1\.0 must be in \[0, 1\)"),
        ({"final_sparsity": -0.1}, r"final_sparsity = -0\.1 must be in"),
        ({"final_sparsity": float("nan")}, r"final_sparsity = nan must be in"),
        ({"initial_sparsity": 0.6}, r"initial_sparsity = 0\.6 must be in \[0, final_sparsity = 0\.5\]"),
        ({"initial_sparsity": -0.1}, r"initial_sparsity = -0\.1"),
        ({"num_steps": 0}, r"num_steps = 0 must be at least 1"),
        ({"solves": -1}, r"solves = -1 must be at least 0"),
        ({"update_interval": 0}, r"update_interval = 0 must be at least 1"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction = 1\.0 must be in \[0, 1\)"),
        ({"cooldown_fraction": -0.5}, r"cooldown_fraction = -0\.5 must be in \[0, 1\)"),
        ({"warmup_fraction": 0.5, "cooldown_fraction": 0.5}, r"warmup_fraction 0\.5 \+ cooldown_fraction 0\.5 leave"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_refusals_name_the_setting_and_its_range(changed, message):
    with pytest.raises(ValueError, match=message):
        CubicSchedule(**{"final_sparsity": 0.5, "num_steps": 100, **changed})


def test_one_shot_prunes_before_the_first_step_only():
    schedule = OneShotSchedule(0.6)
    assert update_steps(schedule, 50) == [0]
    assert {schedule.sparsity_at(s) for s in range(50)} == {0.6}
    assert schedule.is_final(0)
    assert update_steps(OneShotSchedule(0.0), 5) == [0]  # of layers with a sparsity of their own
    assert {OneShotSchedule(0.0).progress_at(s) for s in range(5)} == {1.0}
    with pytest.raises(ValueError, match=r"final_sparsity = 1\.5 must be in \[0, 1\)"):
        OneShotSchedule(1.5)
