"""What the Trainer takes for its best model, when it stops early, and a training that ends on the ramp."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

from pst_ds.hf import PSTCallback
from pst_ds.masks.update import mask_stats

from .trainers import SCHEDULE, STEPS, pst_model, pst_schedule, pst_trainer

pytestmark = pytest.mark.usefixtures("alone")
RAMP_END = pst_schedule().ramp_end
assert 2 < RAMP_END < STEPS - 1


def _trainer(model, data, out, **settings):
    """One whose every evaluation is worse than the one before."""
    settings = {"eval_steps": 1, "save_steps": 1, **settings}
    trainer = pst_trainer(
        model, data, out, save_strategy="steps", eval_strategy="steps", evaluated=True, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False, **settings,
    )  # fmt: skip

    def evaluate(**_):
        metrics = {"eval_loss": float(trainer.state.global_step)}
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    trainer.evaluate = evaluate
    return trainer


def _checkpoints(folder):
    return {path.name for path in folder.glob("checkpoint-*")}


def test_the_best_model_is_one_of_the_final_sparsity_and_is_saved_afterwards(base, data, tmp_path):
    """The optimizer's masters are those of the last step by then."""
    model = pst_model(base, torch.bfloat16)
    trainer = _trainer(model, data, tmp_path)
    trainer.train()
    assert trainer.state.best_metric == RAMP_END
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{RAMP_END}")
    assert mask_stats(model).sparsity == pytest.approx(0.8, abs=1e-3)
    trainer.save_model(str(tmp_path / "final"))
    folders = [tmp_path / f"checkpoint-{RAMP_END}", tmp_path / "final"]
    best, final = (load_file(folder / "pst_model.safetensors") for folder in folders)
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert torch.equal(param, best[name].to(param.dtype))
            assert torch.equal(param, final[name].to(param.dtype))
    assert all(torch.equal(final[name], best[name]) for name in best if name.endswith("pst_mask_bits"))
    tables = [json.loads((folder / "pst_config.json").read_text()) for folder in folders]
    assert {(table["step"], table["masks_frozen"], table["sparsity"]) for table in tables} == {
        (RAMP_END, True, mask_stats(model).sparsity)
    }


@pytest.mark.few(1)
@pytest.mark.parametrize("first", ["pst", "early"])
def test_early_stopping_begins_to_count_at_the_final_sparsity(base, data, tmp_path, first):
    callbacks = [PSTCallback(**SCHEDULE), EarlyStoppingCallback(1)]
    model = pst_model(base)
    trainer = _trainer(model, data, tmp_path, callbacks=callbacks[:: 1 if first == "pst" else -1], save_total_limit=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert trainer.state.global_step == RAMP_END + 1
    assert _checkpoints(tmp_path) == {f"checkpoint-{RAMP_END}"}
    assert mask_stats(model).sparsity == pytest.approx(0.8, abs=1e-3)


@pytest.mark.thorough
def test_a_resumed_run_forgets_the_best_of_the_ramp(base, data, tmp_path):
    _trainer(pst_model(base), data, tmp_path / "one").train()
    folder = tmp_path / "one" / "checkpoint-2"
    assert json.loads((folder / "trainer_state.json").read_text())["best_metric"] == 2.0
    trainer = _trainer(pst_model(base), data, tmp_path / "two", eval_steps=2, save_steps=2)
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.best_metric == RAMP_END
    assert trainer.state.best_model_checkpoint == str(tmp_path / "two" / f"checkpoint-{RAMP_END}")


@pytest.mark.thorough
def test_a_training_that_ends_on_the_ramp_says_so(base, data, tmp_path):
    model = pst_model(base)
    trainer = _trainer(model, data, tmp_path, callbacks=[PSTCallback(final_sparsity=0.8, num_steps=3 * STEPS)])
    with pytest.warns(UserWarning, match="ahead of the schedule's end") as said:
        trainer.train()
    begin, end = [str(warning.message) for warning in said if "ahead of the schedule's end" in str(warning.message)]
    assert begin.startswith(f"the Trainer ends at step {STEPS}, ahead of the schedule's end: at a sparsity of 0.")
    assert "not 0.8. Leave out num_steps" in begin
    assert end.startswith(f"training ended after {STEPS} applied steps")
    assert f"a sparsity of {mask_stats(model).sparsity:.3g}, not 0.8" in end
    assert 0.0 < mask_stats(model).sparsity < 0.79
