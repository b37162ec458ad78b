"""Checkpoints that engines write: what is in them, what they fit, and what a save takes."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pst_ds.checkpoint import writer as checkpoint_writer
from pst_ds.checkpoint.format import CheckpointError, read_checkpoint
from pst_ds.checkpoint.restore import load_into, magnitude_scales
from pst_ds.checkpoint.writer import CheckpointWriter, size_limit
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel import optimizer_state
from pst_ds.parallel.engine import build_engine
from tests.checkpoint.small_engine import (
    KINDS,
    assert_holds,
    optimizer_values,
    save_as_ranks,
    small_model,
    state_of,
    trainables,
    trained_engine,
)
from tests.pairs import every_pair
from tools.bench.timing import status_bytes


@every_pair
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_the_masters_moments_and_masks_whatever_the_number_of_ranks(tmp_path, world, dtype, copies):
    engine, keep = trained_engine(dtype=dtype)
    folder = tmp_path / "step-00000012"
    written = save_as_ranks(folder, engine, world, copies)
    values, named = optimizer_values(engine), trainables(engine.module)
    assert all(of_kind["classifier.weight"].all() for of_kind in values.values())
    checkpoint = assert_holds(folder, values, keep)
    assert checkpoint.state == state_of(engine.module)
    assert checkpoint.contents.steps == dict.fromkeys(named, 3)
    assert "layers.0.weight" not in checkpoint.trained  # it is frozen
    if dtype == torch.bfloat16:  # not the model's own rounded values
        assert not torch.equal(checkpoint.trained["classifier.weight"], named["classifier.weight"].float())
    names = [f"shard-{i + 1:05d}-of-{world:05d}.safetensors" for i in range(world)]
    assert {p.name for p in tmp_path.glob("*/*")} == {"manifest.json", "SHA256SUMS", *names}
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    files = [load_file(folder / name) for name in names]  # plain safetensors files
    trained = sum(p.numel() for p in named.values())
    for kind in KINDS:
        assert sum(tensors[kind].numel() for tensors in files) == trained
    assert all(tensors.keys() == {*KINDS, "mask"} for tensors in files)
    assert [t["mask"].numel() for t in files] == [2 * {1: 14, 2: 7, 3: 5}[world]] * world  # 108, 54, 36 bits
    total = sum(p.stat().st_size for p in folder.iterdir())
    assert written.bytes == total <= size_limit(engine.module) == trained * 12 + 2 * 108 // 8 + 10**6
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout.count(": OK\n")) == (0, world + 1), checked.stdout


@every_pair
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_what_is_saved_is_loaded_whatever_the_number_of_shards(tmp_path, world, num_shards):
    engine, _ = trained_engine()
    save_as_ranks(tmp_path / "c", engine, world)
    fresh, x = small_model(num_shards=num_shards), torch.ones(12)
    for layer in pst_layers(fresh).values():
        layer.magnitude_scales = (99.0,)
    assert not torch.equal(fresh(x), engine(x))
    load_into(fresh, read_checkpoint(tmp_path / "c"))
    values = dict(fresh.named_parameters())
    for name, param in engine.module.named_parameters():
        assert name.endswith("pst_mask") or torch.equal(values[name], param), name
    assert magnitude_scales(fresh) == magnitude_scales(engine.module)
    assert torch.equal(fresh(x), engine(x))  # masks and all


def test_a_newer_checkpoint_replaces_the_older_also_of_other_ranks(tmp_path):
    save_as_ranks(tmp_path / "c", trained_engine()[0], world=3)
    newer, _ = trained_engine(seed=5)
    save_as_ranks(tmp_path / "c", newer, world=2, step=99)
    checkpoint = read_checkpoint(tmp_path / "c")
    assert (checkpoint.state.step, checkpoint.contents.num_shards) == (99, 2)
    assert torch.equal(checkpoint.trained["classifier.weight"], newer.module.classifier.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def _refusal(model, checkpoint):
    with pytest.raises(CheckpointError) as caught:
        load_into(model, checkpoint)
    return str(caught.value)


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
def test_a_model_that_it_does_not_fit_is_refused_by_name_and_not_changed(tmp_path, settings, reason):
    save_as_ranks(tmp_path / "c", trained_engine()[0])
    model = small_model(**settings)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    message = _refusal(model, read_checkpoint(tmp_path / "c"))
    assert message.startswith(str(tmp_path / "c"))
    assert reason in message
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("where", ["masks", "weight_scales"])
def test_masks_and_scales_of_other_layers_are_refused(tmp_path, where):
    save_as_ranks(tmp_path / "c", trained_engine()[0])
    checkpoint = read_checkpoint(tmp_path / "c")
    table = checkpoint.contents.masks if where == "masks" else checkpoint.state.magnitude_scales
    table["layers.2"] = table.pop("layers.1")
    said = {"masks": "masks differ in layers.1, layers.2", "weight_scales": "weight_scales belong to other layers"}
    assert said[where] in _refusal(small_model(), checkpoint)


@pytest.mark.parametrize("leftover", ["shard-00003-of-00003.safetensors", "SHA256SUMS", "x.pt"])
def test_what_a_killed_save_of_other_ranks_left_does_not_get_into_the_next(tmp_path, leftover):
    engine, keep = trained_engine()
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / leftover).write_bytes(b"x" * 10**6)
    save_as_ranks(tmp_path / "c", engine, world=2)
    assert_holds(tmp_path / "c", optimizer_values(engine), keep)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_save_waits(tmp_path, monkeypatch, dtype):
    engine, keep = trained_engine(dtype=dtype)
    writer, go, written = CheckpointWriter(tmp_path, engine), threading.Event(), []
    write, join, fragments = checkpoint_writer.write_pieces, threading.Thread.join, optimizer_state.local_fragments

    def blocked(path, pieces):
        assert go.wait(60)
        return write(path, pieces)

    monkeypatch.setattr(checkpoint_writer, "write_pieces", blocked)
    before = optimizer_values(engine)
    writer.save("one", state_of(engine.module))
    assert writer.wait(0.0) is None
    engine.backward(engine(torch.ones(4, 12, dtype=dtype)).float().square().sum())
    engine.step()
    for layer in pst_layers(engine.module).values():
        layer.pst_mask.data.zero_()
    after = optimizer_values(engine)
    assert not (tmp_path / "one").exists()

    def let_go_and_join(self, timeout=None):
        go.set()
        return join(self, timeout)

    def local_fragments(*arguments):
        written.append((tmp_path / "one").exists())  # the second save begins to copy
        return fragments(*arguments)

    monkeypatch.setattr(threading.Thread, "join", let_go_and_join)
    monkeypatch.setattr(optimizer_state, "local_fragments", local_fragments)
    writer.save("two", state_of(engine.module))
    assert written == [True]
    assert writer.wait().name == "two"
    assert writer.wait() is None  # it is told once
    assert_holds(tmp_path / "one", before, keep)
    assert_holds(tmp_path / "two", after, {name: np.zeros(108, bool) for name in keep})
    for kind in KINDS:
        assert not torch.equal(before[kind]["classifier.weight"], after[kind]["classifier.weight"])


def test_a_second_save_copies_into_the_memory_of_the_first(tmp_path, torch_bytes):
    engine, _ = trained_engine()
    writer = CheckpointWriter(tmp_path, engine)
    size = 12 * sum(p.numel() for p in trainables(engine.module).values())
    first, kept = torch_bytes(lambda: (writer.save("one", state_of(engine.module)), writer.wait()))
    assert size <= kept <= first < 2 * size
    most, kept = torch_bytes(lambda: (writer.save("two", state_of(engine.module)), writer.wait()))
    assert (most < size / 4, kept) == (True, 0)


@pytest.mark.parametrize(("copies", "most"), [(True, 1.4), (False, 0.4)])
def test_a_save_takes_the_memory_of_its_copy_and_no_more(tmp_path, copies, most):
    model = torch.nn.Linear(1 << 14, 1 << 9)  # 8 million values: 100 MB
    engine = build_engine(model, [{"params": list(model.parameters()), "lr": 1e-3, "name": "all"}], ds_config=None)
    engine.backward(engine(torch.ones(1, 1 << 14)).sum())
    engine.step()
    size = 12 * sum(p.numel() for p in model.parameters())
    writer = CheckpointWriter(tmp_path, engine)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = status_bytes("VmRSS")
    writer.save("c", state_of(model), copies=copies)
    assert writer.wait().error == ""
    assert status_bytes("VmHWM") - before < most * size


def test_after_a_save_without_a_copy_the_next_has_one(tmp_path):
    engine, keep = trained_engine()
    writer = CheckpointWriter(tmp_path, engine)
    writer.save("as-it-lies", state_of(engine.module), copies=False)
    assert writer.wait().error == ""
    values = optimizer_values(engine)
    writer.save("copied", state_of(engine.module))
    engine.module.classifier.weight.data.zero_()
    assert writer.wait().error == ""
    for name in ("as-it-lies", "copied"):
        assert_holds(tmp_path / name, values, keep)
