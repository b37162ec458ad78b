"""Scales in a checkpoint: written and read back in any cut; forged ones are refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import nn

from pst_ds.checkpoint.format import CheckpointError, CheckpointState, read_checkpoint
from pst_ds.checkpoint.restore import load_into, magnitude_scales, trainable
from pst_ds.checkpoint.writer import size_limit
from pst_ds.config.pst import PSTConfig
from pst_ds.core.quantization import Grid
from pst_ds.masks.scales import update_scales
from pst_ds.nn.inject import inject_pst, pst_layers, round_weights
from pst_ds.parallel.engine import build_engine
from tests.checkpoint.small_engine import save_checkpoint

CONFIG = PSTConfig(modules_to_save=(), score_rank=2, update_rank=2)

STATE = CheckpointState(
    step=3, sparsity=0.0, masks_frozen=True, precision="fp32", device_type="cpu", base_path="base",
    base_fingerprint="f00d", labels=[], magnitude_scales={}, metrics={}, rounds=True,
)  # fmt: skip


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(64, 6, bias=False), nn.Linear(32, 10, bias=False)])


def _model(grid: Grid | None = Grid(4, 32)):  # noqa: B008  immutable
    return inject_pst(_Model(), CONFIG, grid=grid)


@pytest.fixture
def saved(tmp_path):
    """A model that rounds, and the folder of its checkpoint."""
    model = _model()
    update_scales(model)
    round_weights(model)
    state = replace(STATE, magnitude_scales=magnitude_scales(model))
    groups = [{"params": [param for _, param in trainable(model)], "name": "all"}]
    save_checkpoint(tmp_path / "c", build_engine(model, groups, ds_config=None), state)
    return model, tmp_path / "c"


def test_scales_are_read_back_and_loaded(saved):
    model, folder = saved
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.contents.grid, checkpoint.contents.scales) == (
        (4, 32),
        {"layers.0": (6, 2), "layers.1": (10, 1)},
    )
    other = _model()
    assert not any(layer.rounds for layer in pst_layers(other).values())
    load_into(other, checkpoint)
    for name, layer in pst_layers(model).items():
        assert torch.equal(checkpoint.scales[name], layer.rounding().scales)
        assert torch.equal(pst_layers(other)[name].masked_weight(), layer.masked_weight())
        assert pst_layers(other)[name].rounds
    assert size_limit(model) - size_limit(_model(None)) == 2 * (12 + 10)


@pytest.mark.parametrize("grid", [None, Grid(8, 32), Grid(4)], ids=str)
def test_a_model_of_another_grid_is_refused(saved, grid):
    with pytest.raises(CheckpointError, match=r"quantised differently, or not at all; use the \[quantization\]"):
        load_into(_model(grid), read_checkpoint(saved[1]))


@given(st.data())
def test_hand_made_scales_are_read_in_any_range(tmp_path_factory, data):
    """Files that no code of the package has written: each has an even part of every layer's bytes."""
    num_shards, side = data.draw(st.integers(1, 4)), st.integers(1, 5)
    shapes = {f"m{i}": [data.draw(side), data.draw(side)] for i in range(data.draw(st.integers(1, 3)))}
    random_bits = np.random.default_rng(4)
    scales = {name: random_bits.integers(0, 1 << 16, shape, np.uint16) for name, shape in shapes.items()}
    folder = tmp_path_factory.mktemp("any")
    for i in range(num_shards):
        parts = [np.empty(0, np.uint8)]
        for bits in scales.values():
            share = -(-bits.nbytes // num_shards)
            parts.append(bits.reshape(-1).view(np.uint8)[i * share : (i + 1) * share])
        tensors = dict.fromkeys(("master", "exp_avg", "exp_avg_sq"), np.empty(0, np.float32))
        tensors |= {"mask": np.zeros(len(shapes), np.uint8), "scales": np.concatenate(parts)}
        save_file(tensors, folder / f"shard-{i + 1:05d}-of-{num_shards:05d}.safetensors")
    contents = {"num_shards": num_shards, "trained": {}, "masks": dict.fromkeys(shapes, 8), "steps": {}, "cuts": None}
    state = asdict(STATE)
    state["weight_scales"] = state.pop("magnitude_scales")
    manifest = {"format": 3, "state": state, "contents": contents | {"grid": [8, 0], "scales": shapes}}
    _forge(folder, manifest, "format", 3)
    checkpoint = read_checkpoint(folder)
    for name, bits in scales.items():
        found = checkpoint.scales[name]
        assert (found.dtype, found.shape) == (torch.bfloat16, bits.shape)
        assert found.view(torch.uint16).tolist() == bits.tolist()
        start = data.draw(st.integers(0, bits.nbytes))
        stop = data.draw(st.integers(start, bits.nbytes))
        assert checkpoint.scale_bytes(name, start, stop).tolist() == list(bits.tobytes()[start:stop])


def _forge(folder, manifest, dotted, value):
    """Put ``value`` in place of a part of the manifest, with sums that fit."""
    forged = json.loads(json.dumps(manifest))
    *parents, last = dotted.split(".")
    table = forged
    for key in parents:
        table = table[key]
    table[last] = value
    (folder / "manifest.json").write_text(json.dumps(forged))
    names = sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


@pytest.mark.parametrize(
    ("dotted", "values"),
    [
        ("contents.grid", (None, [4], [4, 32, 1], [5, 32], [4, 33], [4, -1], "42", 3, [True, 0], [4.0, 32])),
        ("contents.scales", (None, {}, [], "m", {"layers.0": [6, 2]}, {"layers.0": [6, 2], "x": [10, 1]})),
        ("contents.scales.layers", ([6, 2], None)),
        ("state.rounds", (None, 1, "true", [])),
        ("format", (2,)),
    ],
)  # fmt: skip
def test_forged_scales_are_refused(saved, dotted, values):
    folder = saved[1]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for value in values:
        _forge(folder, manifest, dotted, value)
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(folder)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "shape", [[0, 6], [6], [1, 2, 3], [1 << 47, 1 << 47], [3, 3], "62", None, [6.0, 2], [-6, -2]], ids=str
)
def test_forged_shapes_of_scales_are_refused(saved, shape):
    folder = saved[1]
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["contents"]["scales"]["layers.0"] = shape
    _forge(folder, manifest, "contents.scales", manifest["contents"]["scales"])
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), -1e-40, 3e38])
def test_scales_that_there_cannot_be_are_not_loaded(saved, value):
    """Their sums are right, as somebody else's program would write them."""
    folder = saved[1]
    (path,) = folder.glob("shard-*.safetensors")
    tensors = load_file(path)
    held = torch.from_numpy(tensors["scales"].copy()).view(torch.bfloat16)
    held[7] = value
    save_file({**tensors, "scales": held.view(torch.uint8).numpy()}, path)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    _forge(folder, manifest, "format", manifest["format"])
    checkpoint = read_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"layers\.0: scale 7 is .*; scales are at least 2\^-126") as caught:
        load_into(_model(), checkpoint)
    assert str(folder) in str(caught.value)
