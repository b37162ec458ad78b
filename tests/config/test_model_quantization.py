"""Settings of rounding in training: from when on, how often scales are searched, and what is refused."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.config.methods import METHODS
from pst_ds.config.model import QuantizationConfig
from pst_ds.config.settings import ConfigError
from pst_ds.config.toml import dump_run, load_run, run_from_table
from pst_ds.core.schedule import CubicSchedule, OneShotSchedule, RoundingSchedule

INT4 = QuantizationConfig(values="int4")


def _load(tmp_path, *settings):
    return load_run("tests/data/world_size.toml", [f'output_dir="{tmp_path}"', *settings])


@pytest.mark.parametrize(
    ("settings", "start", "interval"),
    [
        ((), 800, 20),  # cooldown_fraction = 0.2
        (("quantization.start_fraction=0.8",), 800, 20),
        (("quantization.start_fraction=0.9",), 900, 10),
        (("quantization.interval=7",), 800, 7),
        (("method=lora",), 0, 100),
        (("method=masked-lora", "quantization.start_fraction=0.5"), 500, 50),
        (("train.num_steps=1000", "schedule.cooldown_fraction=0.001"), 999, 1),
    ],
)
def test_weights_are_rounded_once_masks_are_final(tmp_path, settings, start, interval):
    run = _load(tmp_path, 'quantization.values="int4"', "train.num_steps=1000", *settings)
    assert run.make_schedules(1000).rounding == RoundingSchedule(start, interval, 1000)
    assert run_from_table(tomllib.loads(dump_run(run))) == run


@given(st.integers(1, 400), st.floats(0.01, 0.99), st.floats(0.0, 0.5), st.integers(0, 50))
def test_scales_are_never_searched_while_masks_change_nor_after_the_last_step(num_steps, cooldown, warmup, interval):
    warmup = min(warmup, 0.99 - cooldown)
    masks = CubicSchedule(num_steps=num_steps, warmup_fraction=max(0.0, warmup), cooldown_fraction=cooldown)
    config = QuantizationConfig(values="int8", interval=interval)
    if masks.ramp_end >= num_steps:
        with pytest.raises(ConfigError, match=f"after step {masks.ramp_end} of {num_steps}"):
            config.make_schedule(masks, num_steps)
        return
    schedule = config.make_schedule(masks, num_steps)
    searches = [step for step in range(num_steps + 1) if schedule.updates_scales_at(step)]
    assert searches[0] == schedule.start == masks.ramp_end
    assert searches[-1] < num_steps
    assert all(masks.is_final(step) and schedule.rounds_at(step) for step in searches)
    assert not any(masks.updates_masks_at(step) for step in searches[1:])
    assert not schedule.rounds_at(schedule.start - 1)
    assert len(searches) <= 15 or interval


def test_without_values_nothing_is_rounded(tmp_path):
    assert _load(tmp_path).make_schedules(100).rounding is None
    assert INT4.make_schedule(OneShotSchedule(0.5), 5).start == 0


WRONG = {
    'quantization.values="int2"': r"quantization.values = 'int2' must be one of '', 'int8', 'int4'",
    "quantization.group=48": r"quantization.group = 48 must be one of 32, 64, 128, 'row'",
    "quantization.group=32": r"quantization.group = 32 does nothing without quantization.values or embeddings. Remove",
    "quantization.interval=5": r"quantization.interval = 5 does nothing without quantization.values",
    "quantization.interval=-5": r"quantization.interval = -5 must not be negative",
    "quantization.start_fraction=1.5": r"quantization.start_fraction = 1.5 must be in \[0, 1\)",
}


@pytest.mark.parametrize("setting", WRONG)
def test_wrong_settings_are_refused(tmp_path, setting):
    with pytest.raises(ConfigError, match=WRONG[setting]):
        _load(tmp_path, setting)


def test_rounding_while_masks_change_is_refused(tmp_path):
    early = ('quantization.values="int4"', "quantization.start_fraction=0.7")
    with pytest.raises(
        ConfigError, match=r"start_fraction = 0.7, but masks change until 0.8 of the steps .* Fix: .* 0.8"
    ):
        _load(tmp_path, *early)
    with pytest.raises(ConfigError, match=r"cooldown_fraction = 0 leaves no step for it"):
        _load(tmp_path, early[0], "schedule.cooldown_fraction=0")
    for name, method in METHODS.items():
        settings = [*early, f"method={name}"]
        if method.masks == "ramp":
            with pytest.raises(ConfigError, match=r"quantization\."):
                _load(tmp_path, *settings)
        else:
            assert _load(tmp_path, *settings).make_schedules(100).rounding.start == 70
