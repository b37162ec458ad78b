"""How a run says that it fits too little or too much: when that is measured, said, and what to change."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pst_ds.config.toml import load_run
from pst_ds.core.schedule import CubicSchedule, OneShotSchedule
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.fit_verdict import Verdict, fixes, masks_final, watched_steps
from pst_ds.train.run import prepare, train_prepared

_RATES = (
    "train.score_learning_rate=1e-2", "train.update_learning_rate=1e-3", "train.embedding_learning_rate=2e-4",
    "train.head_learning_rate=5e-4",
)  # fmt: skip


def _run(*settings):
    return load_run("tests/data/world_size.toml", [*_RATES, *settings])


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


def test_masks_are_final_from_the_end_of_the_ramp():
    assert masks_final(None, 10) == masks_final(OneShotSchedule(0.5), 10) == 0
    ramp = CubicSchedule(num_steps=50, cooldown_fraction=0.2)
    assert masks_final(ramp, 50) == ramp.ramp_end == 40


@pytest.mark.parametrize(
    ("settings", "verdict", "expected"),
    [
        (
            ["train.num_steps=100"],
            Verdict("underfits", ""),
            [
                {"train.num_steps": 200},
                {"train.update_learning_rate": 0.002, "train.head_learning_rate": 0.001},
                {"pst.update_rank": 16},
            ],
        ),
        (
            ["method=dense", "train.num_steps=0", "train.num_epochs=1.5"],
            Verdict("underfits", "", is_slow=True),
            [{"train.head_learning_rate": 0.001}, {"train.num_epochs": 3.0}],
        ),
        (
            ["train.num_steps=100", "pst.update_rank=4"],
            Verdict("overfits", "", best_step=40),
            [
                {"train.num_steps": 40},
                {"train.update_learning_rate": 0.0005, "train.head_learning_rate": 0.00025},
                {"model.dropout": 0.1},
                {"pst.update_rank": 2},
            ],
        ),
        (
            ["method=gmp", "train.num_steps=100", "model.dropout=0.2"],
            Verdict("overfits", ""),
            [{"train.num_steps": 50}, {"train.head_learning_rate": 0.00025}, {"model.dropout": 0.4}],
        ),
    ],
    ids=["steps", "slow", "best step", "weights"],
)
def test_what_to_change_is_what_the_method_has(settings, verdict, expected):
    run = _run(*settings)
    found = fixes(run, verdict, run.train.num_steps or 100)
    assert found == expected
    for change in found:  # each is a run file's setting
        _run(*settings, *(f"{name}={value}" for name, value in change.items()))


def _train(folder, *settings, quiet=True):
    run = _run(f"output_dir={folder}", "train.log_interval=10", "pictures.interval=-1", *settings)
    result = train_prepared(prepare(run, launch_environment()), quiet=quiet)
    assert json.loads((Path(folder) / "result.json").read_text())["fit"] == result["fit"]
    return result["fit"]


def _as_settings(change):
    return [f"{name}={value}" for name, value in change.items()]


def _noisy(path):
    """72 of the training texts, every fourth with the wrong label: too few to learn what is right."""
    lines = Path("tests/data/train.jsonl").read_text().splitlines()
    rng, rows = random.Random(0), [json.loads(line) for line in lines[:72]]
    for row in rows:
        if rng.random() < 0.25:
            row["label"] = {"good": "bad", "bad": "good"}[row["label"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={path}"


@pytest.mark.thorough
@pytest.mark.usefixtures("alone")
def test_a_run_that_underfits_says_so_and_its_fix_helps(tmp_path, capsys):
    """With rates that are too low, 100 steps of this model learn nothing. With the rates that it names, they do, and
    nothing is said."""
    slow = ["train.update_learning_rate=5e-4", "train.head_learning_rate=2e-4"]
    settings = ["deepspeed_config=", "train.num_steps=100", *slow]
    before = _train(tmp_path / "before", *settings, quiet=False)
    assert before["verdict"] == "underfits"
    assert capsys.readouterr().err.count("The run underfits: ") == 1
    change = before["fixes"][0]
    assert change == {"train.update_learning_rate": 0.001, "train.head_learning_rate": 0.0004}
    after = _train(tmp_path / "after", *settings, *_as_settings(change), quiet=False)
    assert after["training_loss"] < before["training_loss"]
    assert after["validation_loss"] < before["validation_loss"]


@pytest.mark.usefixtures("alone")
def test_a_run_that_overfits_says_so_and_its_fix_helps(tmp_path, capsys):
    settings = ["deepspeed_config=", "method=dense", "train.head_learning_rate=2e-3", _noisy(tmp_path / "few.jsonl")]
    before = _train(tmp_path / "before", *settings, "train.num_steps=120", quiet=False)
    assert before["verdict"] == "overfits"
    assert capsys.readouterr().err.count("The run overfits: ") == 1
    after = _train(tmp_path / "after", *settings, *_as_settings(before["fixes"][0]))
    assert after["validation_loss"] < before["validation_loss"]


@pytest.mark.thorough
@pytest.mark.usefixtures("alone")
def test_a_healthy_run_says_nothing(tmp_path, capsys):
    settings = ["deepspeed_config=", "method=dense", "train.num_steps=100", "train.head_learning_rate=1e-3"]
    fit = _train(tmp_path / "dense", *settings, quiet=False)
    assert (fit["verdict"], fit["reason"], fit["fixes"]) == (None, "", [])
    assert "The run " not in capsys.readouterr().err


@pytest.mark.zero3
def test_every_rank_says_the_same(run_ranks, tmp_path):
    one, other = run_ranks(_train, 2, tmp_path / "run")
    assert one == other
    assert one["verdict"] == "underfits"
