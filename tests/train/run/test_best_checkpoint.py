"""Which checkpoint is the best: by the validation metric, of those at the final sparsity."""

from __future__ import annotations

import json
import math

import pytest

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.data.tasks.classification import Classification
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.train.checkpointer import Checkpointer
from pst_ds.train.run import prepare, train_prepared
from pst_ds.train.run_folder import open_checkpoint


def _prepared(folder, *overrides):
    run = load_run(
        "tests/data/world_size.toml", ["deepspeed_config=", f"output_dir={json.dumps(str(folder))}", *overrides]
    )
    return prepare(run, LaunchEnvironment(0, 1, 0))


@pytest.mark.thorough
def test_the_best_checkpoint_is_chosen_among_those_at_the_final_sparsity(tmp_path, monkeypatch):
    scores = {4: 0.99, 8: 0.98, 12: 0.97, 16: 0.5, 20: 0.4}  # the sparser, the worse
    order = iter(scores.values())
    monkeypatch.setattr(
        Classification, "metrics", lambda self, outcomes, examples: dict.fromkeys(("accuracy", "macro_f1"), next(order))
    )
    result = train_prepared(_prepared(tmp_path, "eval.interval=4"), quiet=True)
    assert result["best_step"] == 16
    best, final = (read_checkpoint(tmp_path / "checkpoints" / n).state for n in ("best", "final"))
    assert (best.step, best.masks_frozen, best.sparsity, best.metrics["accuracy"]) == (16, True, 0.8, 0.5)
    assert (final.step, final.sparsity, final.metrics["accuracy"]) == (20, 0.8, 0.4)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("scores", "best"),
    [((math.nan, -0.3), 20), ((-0.3, math.nan), 16), ((math.nan, math.nan), None)],
    ids=lambda v: str(v).replace(" ", ""),
)
def test_a_metric_that_is_no_number_is_never_the_best(tmp_path, monkeypatch, scores, best):
    order = iter(scores)
    monkeypatch.setattr(Classification, "metrics", lambda self, outcomes, examples: {"accuracy": next(order)})
    result = train_prepared(_prepared(tmp_path, "eval.interval=16"), quiet=True)
    assert result["best_step"] == best
    assert (tmp_path / "checkpoints" / "best").is_dir() == (best is not None)
    assert read_checkpoint(tmp_path / "checkpoints" / "final").state.progress["best_value"] == (best and -0.3)


def test_a_number_is_better_than_a_value_that_is_none(tmp_path, monkeypatch):
    """Of a run that goes on from a checkpoint with such a value for its best."""
    monkeypatch.setattr(Classification, "metrics", lambda self, outcomes, examples: {"accuracy": -0.3})
    made = Checkpointer.__init__

    def with_nan(self, *arguments, **named):
        made(self, *arguments, **named)
        self._best, self.best_step = math.nan, 3

    monkeypatch.setattr(Checkpointer, "__init__", with_nan)
    assert train_prepared(_prepared(tmp_path, "train.num_steps=4"), quiet=True)["best_step"] == 4


@pytest.mark.thorough
def test_without_an_evaluation_at_the_final_sparsity_there_is_no_best(tmp_path):
    """Also in a folder where an earlier run left one."""
    train_prepared(_prepared(tmp_path), quiet=True)
    assert (tmp_path / "checkpoints" / "best").is_dir()
    prepared = _prepared(tmp_path, "data.validation=", "train.num_steps=4", "seed=1")
    with pytest.raises(ConfigError, match=r"has checkpoints up to step-00000020: continue them with resume = true,"):
        train_prepared(prepared, quiet=True)
    result = train_prepared(prepared, quiet=True, restart=True)
    assert (tmp_path / "checkpoints.previous" / "best").is_dir()
    assert result["best_step"] is None
    assert result["metrics"] == {}
    opened = open_checkpoint(prepared.run, "best")
    assert opened.folder.name == "step-00000004"
    assert opened.state.step == 4
