"""Recordings of some steps: what they hold, and when there is none."""

from __future__ import annotations

import gzip
import json

import pytest

from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.train.run import prepare, train_prepared


def _names(folder, *more):
    settings = ["deepspeed_config=", f"output_dir={json.dumps(str(folder))}", "train.num_steps=4", *more]
    train_prepared(prepare(load_run("tests/data/world_size.toml", settings), LaunchEnvironment(0, 1, 0)), quiet=True)
    made = folder / "profile"
    return sorted(path.name for path in made.iterdir()) if made.is_dir() else []


@pytest.mark.few(1)
@pytest.mark.parametrize(("window", "steps"), [("2:3", "2-3"), ("4:9", "4-4")])
def test_steps_of_the_window_are_recorded_as_far_as_there_are_any(tmp_path, window, steps):
    assert _names(tmp_path, f'train.profile_steps="{window}"') == [f"steps-{steps}.json.gz", f"steps-{steps}.txt"]
    with gzip.open(tmp_path / "profile" / f"steps-{steps}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "cpu_op"]
    assert any(name.startswith("_MaskedLinear") for name in named)
    assert "_MaskedLinear" in (tmp_path / "profile" / f"steps-{steps}.txt").read_text()


def test_none_are_recorded_unless_asked_for_or_beyond_the_end(tmp_path):
    assert _names(tmp_path / "unasked") == []
    assert _names(tmp_path / "beyond", 'train.profile_steps="5:6"') == []


@pytest.mark.parametrize("window", ["3", "0:1", "4:3", "1:2:3", "a:b", "-1:2"])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(ConfigError, match=r"train.profile_steps = '.*' must be the first and the last step"):
        load_run("tests/data/world_size.toml", [f'train.profile_steps="{window}"'])
