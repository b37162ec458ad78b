"""One-shot pruning in scripts: before the model is loaded, and in the Trainer before its first step."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from pst_ds import OneShotSchedule, PruneConfig, PSTConfig, inject_pst, load_pretrained, prune_pretrained
from pst_ds.core.quantization import Grid
from pst_ds.errors import InputError
from pst_ds.hf import PSTCallback
from pst_ds.masks.update import mask_stats
from pst_ds.nn.inject import plain_name, pst_layers
from pst_ds.nn.optimizer import pst_optimizer
from pst_ds.parallel import zero3

from .test_trainer_zero import _trainer
from .trainers import pst_model, pst_trainer

ZEROS = PSTConfig(initial_mask="zeros", pattern="row")
ALPS = PruneConfig(method="alps", samples=16, seed=3)


def _callback(start=ALPS, schedule=None):
    return PSTCallback(schedule or OneShotSchedule(0.5), start=start)


def _model(base, config=ZEROS, **options):
    return inject_pst(AutoModelForSequenceClassification.from_pretrained(base), config, **options)


def _batches(data, size=8):
    names = [name for name in data[0] if name != "labels"]
    rows = [{name: torch.tensor(row[name]) for name in names} for row in data]
    return [
        {name: torch.stack([row[name] for row in rows[at : at + size]]) for name in names} | {"labels": None}
        for at in range(0, len(rows), size)
    ]


@pytest.mark.usefixtures("alone")
def test_the_trainer_trains_the_model_that_it_pruned_and_resumes(base, data, tmp_path):
    model = _model(base)
    trainer = pst_trainer(model, data, tmp_path, callbacks=[_callback()], save_strategy="steps", save_steps=3)
    trainer.train()
    pruned = load_file(tmp_path / "start" / "model.safetensors")
    dense = load_file(base / "model.safetensors")
    for name, layer in pst_layers(model).items():
        weight = pruned[plain_name(name, layer)]
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.masked_weight() != 0, weight != 0)
        assert torch.equal((weight == 0).sum(1), torch.full(weight.shape[:1], weight.shape[1] // 2))
        assert not torch.equal(weight, dense[plain_name(name, layer)] * (weight != 0))  # ALPS moves what it keeps
    started = (tmp_path / "start").stat().st_mtime_ns
    resumed = _model(base)
    again = pst_trainer(resumed, data, tmp_path, callbacks=[_callback()], save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "start").stat().st_mtime_ns == started
    assert all(map(torch.equal, resumed.parameters(), model.parameters()))
    loaded = load_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "start"), tmp_path / "checkpoint-6"
    )
    assert mask_stats(loaded).checksum == mask_stats(model).checksum
    other = pst_trainer(_model(base), data[::-1], tmp_path, callbacks=[_callback()], save_strategy="no")
    with pytest.raises(InputError, match=r"does not match the model, the training data, .*use another output_dir"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("pattern", ["row", "global"])
def test_a_ramp_continues_from_the_pruned_weights(base, data, tmp_path, pattern):
    model = _model(base, PSTConfig(pattern=pattern))
    schedule = {"initial_sparsity": 0.5, "final_sparsity": 0.75, "cooldown_fraction": 0.2}
    pst_trainer(model, data, tmp_path, callbacks=[PSTCallback(start=ALPS, **schedule)]).train()
    fresh = inject_pst(AutoModelForSequenceClassification.from_pretrained(tmp_path / "start"), PSTConfig(pattern="row"))
    for name, layer in pst_layers(model).items():
        assert layer.magnitude_scales == pst_layers(fresh)[name].magnitude_scales
        assert not (layer.masked_weight() != 0)[layer.weight == 0].any()


@pytest.mark.usefixtures("alone")
def test_a_script_gets_the_same_folder_once(base, data, tmp_path):
    config = PruneConfig(method="alps", samples=16, sparsity=0.5)
    batches = _batches(data[:24])
    out = prune_pretrained(base, tmp_path / "one", batches, config, pst=ZEROS, precision="fp32")
    made = out.stat().st_mtime_ns
    assert prune_pretrained(base, tmp_path / "one", batches, config, pst=ZEROS, precision="fp32") == out
    assert out.stat().st_mtime_ns == made
    two = prune_pretrained(base, tmp_path / "two", _batches(data[:16]), config, pst=ZEROS, precision="fp32")
    weights, others = load_file(out / "model.safetensors"), load_file(two / "model.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    prune_pretrained(base, tmp_path / "one", batches, config, pst=ZEROS, precision="bf16")
    assert out.stat().st_mtime_ns != made


def _start_of_two_ranks(base, out, stage):
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    trainer = _trainer(base, out, stage)
    trainer.callback_handler.callbacks = [
        _callback(schedule=OneShotSchedule(0.5)) if isinstance(one, PSTCallback) else one
        for one in trainer.callback_handler.callbacks
    ]
    new = next(one for one in trainer.callback_handler.callbacks if isinstance(one, PSTCallback))
    new.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.train()
    found = {}
    for name, layer in pst_layers(trainer.model).items():
        with zero3.gathered([layer.weight]):
            found[plain_name(name, layer)] = layer.weight.detach().clone()
    return found, mask_stats(trainer.model).sparsity, trainer.model.name_or_path


@pytest.mark.zero3
@pytest.mark.parametrize("stage", [3, 2])
@pytest.mark.few(1)
def test_ranks_share_the_start_of_a_trainer(base, run_ranks, tmp_path, stage):
    results = run_ranks(_start_of_two_ranks, 2, base, tmp_path / "out", stage)
    pruned = load_file(tmp_path / "out" / "start" / "model.safetensors")
    for weights, sparsity, path in results:
        assert path == str(tmp_path / "out" / "start")
        assert sparsity == pytest.approx(0.5, abs=1e-3)
        assert all(torch.equal(weight, pruned[name]) for name, weight in weights.items())


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("config", "options", "callback", "message"),
    [
        (ZEROS, {"base_grid": Grid(bits=8)}, _callback(), "has quantised them. Call pst_ds.prune_pretrained"),
        (PSTConfig(), {}, PSTCallback(start=ALPS, final_sparsity=0.5), "which is 0. Give the schedule an initial_spar"),
    ],
)  # fmt: skip
def test_a_start_that_the_trainer_cannot_make_is_refused(base, data, tmp_path, config, options, callback, message):
    model = _model(base, config, **options)
    with pytest.raises(InputError, match=message):
        pst_trainer(model, data, tmp_path, callbacks=[callback], optimizer=pst_optimizer(model)).train()
    assert not (tmp_path / "start").exists()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        ([], {"sparsity": 0.5}, "batches is empty"),
        ([{"labels": torch.zeros(2)}], {"sparsity": 0.5}, "no tensors besides labels, but labels"),
        ([], {}, "PruneConfig has no sparsity"),
    ],
)
def test_calls_without_what_they_need_are_refused(base, tmp_path, batches, settings, message):
    with pytest.raises(InputError, match=message):
        prune_pretrained(base, tmp_path / "out", batches, PruneConfig(method="alps", **settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("alone")
def test_batches_that_the_model_cannot_read_are_refused(base, data, tmp_path):
    model = pst_model(base)
    callback = _callback()
    trainer = pst_trainer(model, data, tmp_path, callbacks=[callback])
    trainer.data_collator = lambda rows: {"prompt": torch.zeros(len(rows), 2)}
    with pytest.raises(InputError, match=r"no input_ids, but nothing known\. Prune before the model is loaded"):
        trainer.train()
