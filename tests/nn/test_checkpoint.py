"""The portable checkpoint: what is written is read back, whole or not at all, and only into the model it fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pst_ds.core.bits import unpack_range
from pst_ds.nn import checkpoint as checkpoint_module
from pst_ds.nn.checkpoint import (
    CheckpointError,
    CheckpointState,
    base_fingerprint,
    load_into,
    read_checkpoint,
    save_checkpoint,
    weight_scales,
)
from pst_ds.nn.config import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.engine import build_engine
from pst_ds.train.config import ConfigError
from pst_ds.train.mask_update import update_masks
from pst_ds.train.run import open_checkpoint
from pst_ds.train.run_file import load_run


class _Net(torch.nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(12, 9), torch.nn.Linear(9, width)])
        self.classifier = torch.nn.Linear(width, 2)

    def forward(self, x):
        return self.classifier(torch.tanh(self.layers[1](torch.tanh(self.layers[0](x)))))


def _model(seed=0, width=12, num_shards=1, **settings):
    torch.manual_seed(seed)
    return inject_pst(_Net(width), PSTConfig(**settings), num_shards=num_shards)


def _trained(seed=0, sparsity=0.4, **settings):
    """Every trained value and mask bit is unlike that of a fresh model."""
    model = _model(seed, **settings)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape, generator=generator))
    update_masks(model, sparsity)
    return model


def _state(model, **changes):
    return CheckpointState(
        **{
            "step": 12, "sparsity": 0.4, "masks_final": False, "precision": "fp32", "device_type": "cpu",
            "base_path": "base", "base_fingerprint": "f00d", "labels": ["bad", "good"],
            "weight_scales": weight_scales(model), "metrics": {"accuracy": 0.75}, **changes,
        }
    )  # fmt: skip


def _saved(folder, **settings):
    model = _trained(**settings)
    save_checkpoint(folder, model, _state(model))
    return model


def _masks(model):
    layers = pst_layers(model).values()
    return [unpack_range(m.pst_mask.detach(), m.layout.numel, m.num_shards, 0, m.layout.numel) for m in layers]


def _refusal(call, *arguments):
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_what_is_saved_is_loaded_whatever_the_number_of_shards(tmp_path, num_shards):
    model = _saved(tmp_path / "c")
    checkpoint = read_checkpoint(tmp_path / "c")
    assert checkpoint.state == _state(model)
    fresh = _model(num_shards=num_shards)
    assert not torch.equal(fresh(torch.ones(12)), model(torch.ones(12)))
    for layer in pst_layers(fresh).values():
        layer.weight_scales = (99.0,)
    load_into(fresh, checkpoint)
    values = dict(fresh.named_parameters())
    for name, param in model.named_parameters():
        if not name.endswith("pst_mask"):
            assert torch.equal(values[name], param), name
    assert all(torch.equal(a, b) for a, b in zip(_masks(fresh), _masks(model), strict=True))
    assert weight_scales(fresh) == weight_scales(model)
    assert torch.equal(fresh(torch.ones(12)), model(torch.ones(12)))
    if num_shards == 1:
        assert update_masks(fresh, 0.4).num_flipped == 0  # the scores are the same too


def test_the_file_does_not_show_the_number_of_shards(tmp_path):
    model = _saved(tmp_path / "1")
    sharded = _model(num_shards=3)
    load_into(sharded, read_checkpoint(tmp_path / "1"))
    assert not torch.equal(pst_layers(sharded)["layers.0"].pst_mask, pst_layers(model)["layers.0"].pst_mask)
    save_checkpoint(tmp_path / "3", sharded, _state(sharded))
    one, three = (load_file(tmp_path / name / "masks.safetensors") for name in "13")
    assert one.keys() == three.keys() == {"layers.0", "layers.1"}
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert one["layers.0"].numel() == -(-9 * 12 // 8)


def test_the_frozen_weights_are_not_copied(tmp_path):
    model = _saved(tmp_path / "c")
    trained = load_file(tmp_path / "c" / "trained.safetensors")
    assert set(trained) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "layers.0.weight" not in trained
    assert "classifier.weight" in trained
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"trained.safetensors", "masks.safetensors", "state.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"c"}


def test_masters_are_saved_and_not_their_bf16_copies(tmp_path):
    model = _model().bfloat16()
    params = [p for p in model.parameters() if p.requires_grad]
    engine = build_engine(model, [{"params": params, "lr": 1e-4, "name": "all"}], ds_config=None)
    for _ in range(3):
        engine.backward(engine(torch.ones(4, 12, dtype=torch.bfloat16)).float().square().sum())
        engine.step()
    save_checkpoint(tmp_path / "c", model, _state(model, precision="bf16"))
    trained = read_checkpoint(tmp_path / "c").trained
    head = dict(model.named_parameters())["classifier.weight"]
    assert {t.dtype for t in trained.values()} == {torch.float32}
    assert torch.equal(trained["classifier.weight"], head.fp32_master.detach())
    assert not torch.equal(trained["classifier.weight"], head.detach().float())
    assert torch.equal(trained["classifier.weight"].bfloat16(), head.detach())


@pytest.mark.parametrize("name", ["trained.safetensors", "masks.safetensors"])
def test_a_flipped_byte_or_a_missing_file_is_found(tmp_path, name):
    _saved(tmp_path / "c")
    path = tmp_path / "c" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert _refusal(read_checkpoint, tmp_path / "c") == (f"{path} is damaged: its SHA-256 is not the one in state.json")
    path.unlink()
    assert _refusal(read_checkpoint, tmp_path / "c") == f"{path} is missing"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is damaged"),
        ("[]", "has format None; this version reads 1"),
        ('{"format": 2}', "has format 2; this version reads 1"),
        ('{"format": 1}', "is damaged: KeyError('state')"),
        ('{"format": 1, "state": {"step": 1}, "sha256": {}}', "is damaged: TypeError"),
    ],
)
def test_a_damaged_state_is_named(tmp_path, content, reason):
    _saved(tmp_path / "c")
    (tmp_path / "c" / "state.json").write_text(content)
    message = _refusal(read_checkpoint, tmp_path / "c")
    assert message.startswith(str(tmp_path / "c" / "state.json"))
    assert reason in message


def test_a_state_without_checksums_is_damaged(tmp_path):
    _saved(tmp_path / "c")
    table = json.loads((tmp_path / "c" / "state.json").read_text())
    table["sha256"].pop("masks.safetensors")
    (tmp_path / "c" / "state.json").write_text(json.dumps(table))
    assert "is damaged: KeyError('masks.safetensors')" in _refusal(read_checkpoint, tmp_path / "c")


def test_no_checkpoint_says_where_it_looked(tmp_path):
    assert _refusal(read_checkpoint, tmp_path / "c") == f"no checkpoint in {tmp_path / 'c'}: state.json is missing"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"exclude_modules": ("layers.0",)}, "trained parameters differ in layers.0.pst_A, layers.0.pst_B"),
        ({"structured_scores": False}, "trained parameters differ in layers.0.pst_C, layers.0.pst_R"),
        ({"modules_to_save": ()}, "trained parameters differ in classifier.bias, classifier.weight"),
        ({"width": 13}, "layers.1.pst_A has shape (12, 8), the model's is (13, 8)"),
        ({"update_rank": 4}, "layers.0.pst_U has shape (9, 8), the model's is (9, 4)"),
    ],
)
def test_a_model_that_it_does_not_fit_is_refused_by_name(tmp_path, settings, reason):
    _saved(tmp_path / "c")
    model = _model(**settings)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    message = _refusal(load_into, model, read_checkpoint(tmp_path / "c"))
    assert message.startswith(str(tmp_path / "c"))
    assert reason in message
    if "differ" in reason:  # found before anything is written
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_masks_of_other_layers_are_refused(tmp_path):
    _saved(tmp_path / "c")
    checkpoint = read_checkpoint(tmp_path / "c")
    masks = {"layers.1": checkpoint.masks["layers.1"], "layers.2": checkpoint.masks["layers.0"]}
    message = _refusal(load_into, _model(), dataclasses.replace(checkpoint, masks=masks))
    assert "masks differ in layers.0, layers.2" in message


def test_a_newer_checkpoint_replaces_the_older(tmp_path):
    _saved(tmp_path / "c")
    newer = _trained(seed=5)
    save_checkpoint(tmp_path / "c", newer, _state(newer, step=99))
    checkpoint = read_checkpoint(tmp_path / "c")
    assert checkpoint.state.step == 99
    assert torch.equal(checkpoint.trained["classifier.weight"], newer.classifier.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("moment", ["save_file", "file_sha256", "_replace_folder", "rename"])
def test_a_crash_while_saving_keeps_the_older(tmp_path, monkeypatch, moment):
    import safetensors.torch

    older = _saved(tmp_path / "c")

    rename = Path.rename

    def crash(*arguments):
        if moment == "rename" and not arguments[0].name.endswith(".partial"):
            return rename(*arguments)
        raise OSError("No space left on device")

    newer = _trained(seed=5)
    with monkeypatch.context() as patch:
        owners = {"save_file": safetensors.torch, "rename": Path}
        patch.setattr(owners.get(moment, checkpoint_module), moment, crash)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path / "c", newer, _state(newer, step=99))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    checkpoint = read_checkpoint(tmp_path / "c")
    assert checkpoint.state == _state(older)
    assert torch.equal(checkpoint.trained["classifier.weight"], older.classifier.weight)
    save_checkpoint(tmp_path / "c", newer, _state(newer, step=99))  # and the next attempt is not in the way
    assert read_checkpoint(tmp_path / "c").state.step == 99
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_another_base_model_is_refused(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"one")
    model = _trained()
    run = load_run(
        "tests/data/world_size.toml",
        [f"output_dir={json.dumps(str(tmp_path / 'run'))}", f"model.path={json.dumps(str(base))}"],
    )
    state = _state(model, base_path=str(base), base_fingerprint=base_fingerprint(base))
    save_checkpoint(tmp_path / "run" / "checkpoints" / "final", model, state)
    assert open_checkpoint(run, "best").folder.name == "final"  # no best was chosen
    save_checkpoint(tmp_path / "run" / "checkpoints" / "best", model, state)
    assert open_checkpoint(run, "best").folder.name == "best"
    (base / "model.safetensors").write_bytes(b"two")
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(run, "final")
    message = str(caught.value)
    assert f"model.path = {str(base)!r} is not the base model that" in message
    assert str(tmp_path / "run" / "checkpoints" / "final") in message
    assert "--set model.path=" in message


def test_the_fingerprint_follows_names_sizes_and_a_sample_of_the_bytes(tmp_path):
    assert base_fingerprint(tmp_path) == ""
    (tmp_path / "notes.txt").write_text("x")
    assert base_fingerprint(tmp_path) == ""
    seen = set()
    for name, data in (("a", b"1"), ("a", b"2"), ("a", b"12"), ("b", b"1"), ("c", bytes(5 << 20))):
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        seen.add(base_fingerprint(tmp_path))
    (tmp_path / "c.safetensors").write_bytes(bytes(4 << 20) + b"1" + bytes((1 << 20) - 1))
    seen.add(base_fingerprint(tmp_path))
    assert len(seen) == 6
