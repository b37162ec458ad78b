"""``train.profile`` has the first and the last of the steps to profile, in one message if it has not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pst_ds.config.run import ConfigError, FinetuneConfig
from pst_ds.config.toml import dump_run, load_run, run_from_table
from pst_ds.config.train import TrainConfig
from pst_ds.train.stages import require_schedules
from pst_ds.train.users.train import UserTraining, run_of_users

RUN_FILE = "tests/data/world_size.toml"
"""A run of 20 steps."""


@pytest.mark.parametrize("steps", ["[1, 1]", "[3, 7]", "[20, 20]"])
def test_two_steps_of_the_run_are_read_and_written(steps, tmp_path):
    run = load_run(RUN_FILE, [f"train.profile={steps}"])
    assert str(list(run.train.profile)) == steps
    (tmp_path / "run.toml").write_text(dump_run(run))
    assert load_run(tmp_path / "run.toml") == run
    assert load_run(RUN_FILE).train.profile == ()


@pytest.mark.parametrize("steps", ["[3]", "[1, 2, 3]", "[0, 2]", "[5, 4]", "[-1, 4]", "[19, 21]"])
def test_other_numbers_are_refused_with_what_to_set(steps):
    with pytest.raises(ConfigError) as caught:
        load_run(RUN_FILE, [f"train.profile={steps}"])
    (message,) = caught.value.args
    assert message == (
        f"train.profile = {steps} must be the first and the last of the 20 steps to profile, counted from 1. Set two "
        "such numbers, such as [1, 3], or remove it"
    )


@pytest.mark.parametrize("value", ['"1-3"', "3", "[1.5, 2]", "[true, 2]", '["1", "2"]'])
def test_what_is_not_a_list_of_whole_numbers_is_refused(value):
    with pytest.raises(ConfigError, match=r"train\.profile = .* must be a list of whole numbers"):
        load_run(RUN_FILE, [f"train.profile={value}"])


def test_the_steps_of_epochs_are_known_once_the_data_is_read():
    run = load_run(RUN_FILE, ["train.num_steps=0", "train.num_epochs=2", "train.profile=[3, 7]"])
    assert require_schedules(run, 24 * 4) == 8
    with pytest.raises(ConfigError, match=r"train\.profile = \[3, 7\] must be the first and the last of the 6 steps"):
        require_schedules(run, 24 * 3)
    with pytest.raises(ConfigError, match=r"the first and the last steps to profile, .* as \[1, 3\]"):
        TrainConfig(num_epochs=1.0, profile=(2, 1))


def test_neither_the_fine_tuning_nor_the_training_of_users_is_profiled():
    run = load_run(RUN_FILE, ["train.profile=[3, 20]"])
    staged = replace(run, finetune=FinetuneConfig(method="lora", num_steps=2))
    assert staged.finetuning().train.profile == ()
    assert run_of_users(run, UserTraining()).train.profile == ()


def test_python_takes_lists_and_tuples():
    assert TrainConfig(num_steps=4, profile=[1, 4]).profile == (1, 4)  # type: ignore[arg-type]
    table = {"output_dir": "runs/a", "model": {"path": "m"}, "data": {"train": "t"}}
    assert run_from_table({**table, "train": {"num_steps": 4, "profile": [2, 3]}}).train.profile == (2, 3)
