"""What a plan decides, against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pst_ds.planning.machines import MACHINES
from pst_ds.planning.time import TimePlan
from pst_ds.planning.verdict import Need, Work, verdict

WORK = Work(
    ranks=8, steps=1000, mask_updates=50, tokens=64 * 4096, flops=3e14, start_seconds=30.0,
    need=Need(int(70e9), int(60e9)), model_bytes=int(16e9), checkpoint_bytes=int(1e9), least_batch=16,
)  # fmt: skip
TIMES = TimePlan(
    step_compute=1.0, step_network=0.2, step_launching=0.1, step_host=0.4, step_bound="products", step=1.2,
    full_step=1.1, update_compute=0.3, update_network=0.1, update=0.4, step_received=0, update_received=0,
)  # fmt: skip


def test_the_time_is_that_of_steps_updates_and_loading():
    found = verdict(WORK, TIMES, MACHINES["h100"])
    seconds = 16e9 / 2e9 + 30 + 1000 * 1.2 + 50 * 0.4
    assert found.hours == pytest.approx(seconds / 3600)
    assert found.rank_hours == pytest.approx(8 * seconds / 3600)
    assert found.tokens_per_second == pytest.approx(1000 * 64 * 4096 / (1200 + 20))
    assert found.tokens_per_second_per_rank == pytest.approx(found.tokens_per_second / 8)
    assert found.mfu == pytest.approx(3e14 / 1.2 / 989e12)
    assert (found.load_seconds, found.checkpoint_seconds, found.least_batch) == (8.0, 0.5, 16)


@pytest.mark.parametrize(("enough", "fits"), [(73.5e9, True), (73.7e9, False)])
def test_a_rank_has_what_is_left_of_its_device(enough, fits):
    found = verdict(replace(WORK, need=Need(int(enough), int(60e9))), TIMES, MACHINES["h100"])
    assert found.capacity_bytes == round(0.92 * 80e9)
    assert found.fits is fits
    assert found.margin_bytes == found.capacity_bytes - int(enough)
    assert (found.needed_bytes, found.least_bytes) == (int(enough), int(60e9))


def test_memory_of_one_s_own_is_taken_in_its_place_and_a_machine_without_any_judges_nothing():
    assert verdict(WORK, TIMES, MACHINES["h100"], memory=int(69e9)).margin_bytes == -int(1e9)
    unknown = verdict(WORK, TIMES, MACHINES["cpu"])
    assert (unknown.capacity_bytes, unknown.fits, unknown.margin_bytes, unknown.mfu) == (None,) * 4
