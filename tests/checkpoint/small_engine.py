"""A small engine after some steps, saved as any number of ranks would, and what a checkpoint of it must hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pst_ds.checkpoint import writer as checkpoint_writer
from pst_ds.checkpoint.format import CheckpointState, read_checkpoint
from pst_ds.checkpoint.restore import magnitude_scales
from pst_ds.checkpoint.writer import CheckpointWriter
from pst_ds.config.pst import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.engine import build_engine

KINDS = ("master", "exp_avg", "exp_avg_sq")


class _Net(torch.nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(12, 9), torch.nn.Linear(9, width)])
        self.classifier = torch.nn.Linear(width, 2)

    def forward(self, x):
        return self.classifier(torch.tanh(self.layers[1](torch.tanh(self.layers[0](x)))))


def small_model(width=12, num_shards=1, **settings):
    torch.manual_seed(0)
    return inject_pst(_Net(width), PSTConfig(**settings), num_shards=num_shards)


def trained_engine(seed=1, dtype=torch.float32):
    """An engine after three steps with random masks; and the masks."""
    model = small_model().to(dtype)
    random_numbers = np.random.default_rng(seed)
    keep = {name: random_numbers.random(layer.layout.numel) < 0.6 for name, layer in pst_layers(model).items()}
    for name, layer in pst_layers(model).items():
        layer.pst_mask.data.copy_(torch.from_numpy(np.packbits(keep[name], bitorder="little")))
    params = [p for p in model.parameters() if p.requires_grad]
    engine = build_engine(model, [{"params": params, "lr": 1e-3, "name": "all"}], ds_config=None)
    for i in range(3):
        engine.backward(engine(torch.full((4, 12), seed + i, dtype=dtype)).float().square().sum())
        engine.step()
    return engine, keep


def save_checkpoint(folder, engine, state):
    """Write ``folder`` and wait for it. Raises OSError."""
    writer = CheckpointWriter(folder.parent, engine)
    writer.save(folder.name, state)
    if error := writer.wait().error:
        raise OSError(f"{folder} could not be written: {error}")


def state_of(model, **changes):
    return CheckpointState(
        **{
            "step": 12, "sparsity": 0.4, "masks_frozen": False, "precision": "fp32", "device_type": "cpu",
            "base_path": "base", "base_fingerprint": "f00d", "labels": ["bad", "good"],
            "magnitude_scales": magnitude_scales(model), "metrics": {"accuracy": 0.75},
            "progress": {"batch": 3}, **changes,
        }
    )  # fmt: skip


class _OneAfterAnother:
    """The group of ranks that save in this process, the last first."""

    def __init__(self, reports, world):
        self.reports, self.world = reports, world

    def decide(self, report, decision):
        self.reports.insert(0, report)
        return decision(self.reports) if len(self.reports) == self.world else ("", 0)


def save_as_ranks(folder, engine, world=1, copies=True, **changes):
    """Save as ``world`` ranks that all hold everything; what rank 0 says of it."""
    reports = []
    for own in reversed(range(world)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint_writer, "rank", lambda own=own: own)
            patch.setattr(checkpoint_writer, "world_size", lambda: world)
            patch.setattr(checkpoint_writer, "StoreGroup", lambda: _OneAfterAnother(reports, world))
            writer = CheckpointWriter(folder.parent, engine)
            writer.save(folder.name, state_of(engine.module, **changes), copies=copies)
            written = writer.wait()
    assert written.error == ""
    return written


def trainables(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def optimizer_values(engine):
    """Flat copies of what the optimizer holds of every trainable value, by kind and name."""
    masters = {n: getattr(p, "fp32_master", p) for n, p in trainables(engine.module).items()}
    state = engine.optimizer.state
    found = {"master": masters} | {k: {n: state[m][k] for n, m in masters.items()} for k in KINDS[1:]}
    return {kind: {n: t.detach().flatten().clone() for n, t in of_kind.items()} for kind, of_kind in found.items()}


def assert_holds(folder, values, keep):
    checkpoint = read_checkpoint(folder)
    assert list(checkpoint.trained) == list(values["master"])
    for kind, of_kind in values.items():
        for name, flat in of_kind.items():
            assert torch.equal(checkpoint.values(name, kind, 0, flat.numel()), flat), (kind, name)
    for name, mask in keep.items():
        assert checkpoint.masks[name].tolist() == np.packbits(mask, bitorder="little").tolist()
    return checkpoint
