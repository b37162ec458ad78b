"""Checkpoints of earlier versions with one file for the ranks of each host: they are read and resumed from."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pst_ds.checkpoint.format import CheckpointError, CheckpointState, read_checkpoint, sums_text
from pst_ds.checkpoint.restore import magnitude_scales
from pst_ds.checkpoint.retention import keep, newest_valid
from pst_ds.checkpoint.shards import TensorFiles
from pst_ds.checkpoint.writer import save_checkpoint
from pst_ds.config.pst import PSTConfig
from pst_ds.config.toml import load_run
from pst_ds.file_names import step_folders
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.launch import launch_environment
from pst_ds.parallel.optimizer_state import KINDS
from pst_ds.train.run import prepare, train_prepared


def _engine():
    """One of two layers after a step, with masks of its own; the same on every rank."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(12, 9), torch.nn.Linear(9, 7)])
    model.forward = lambda x: model.layers[1](torch.tanh(model.layers[0](x)))
    inject_pst(model, PSTConfig(modules_to_save=()))
    numbers = np.random.default_rng(1)
    for layer in pst_layers(model).values():
        bits = np.packbits(numbers.random(layer.layout.numel) < 0.6, bitorder="little")
        layer.pst_mask.data.copy_(torch.from_numpy(bits))
    params = [p for p in model.parameters() if p.requires_grad]
    engine = build_engine(model, [{"params": params, "lr": 1e-2, "name": "all"}], ds_config=None)
    engine.backward(engine(torch.ones(4, 12)).square().sum())
    engine.step()
    return engine


def _state(engine, step):
    return CheckpointState(
        step=step, sparsity=0.4, masks_frozen=False, precision="fp32", device_type="cpu", base_path="base",
        base_fingerprint="f00d", labels=[], magnitude_scales=magnitude_scales(engine.module), metrics={},
    )  # fmt: skip


def _join_files(folder, hosts):
    """Turn a checkpoint with a file per rank into one with a file for each of ``hosts``, lists of ranks."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["format"], manifest["contents"]["hosts"] = 4, hosts
    shards = sorted(folder.glob("shard-*"))
    for file, ranks in enumerate(hosts):
        tensors = {f"{key}/{i}": values for i in ranks for key, values in load_file(shards[i]).items()}
        save_file(tensors, folder / f"host-{file + 1:05d}-of-{len(hosts):05d}.safetensors")
    for path in shards:
        path.unlink()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    files = [path for path in folder.iterdir() if path.name != "SHA256SUMS"]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (folder / "SHA256SUMS").write_text(sums_text(sums))


def _save_twice(folder):
    engine = _engine()
    for step in (1, 2):
        save_checkpoint(folder / f"step-{step:08d}", engine, _state(engine, step))


@pytest.mark.zero3
@pytest.mark.parametrize("hosts", [[[0, 1]], [[0, 2], [1]]], ids=["aa", "aba"])
def test_files_of_hosts_have_the_values_of_files_of_ranks(run_ranks, tmp_path, hosts):
    run_ranks(_save_twice, sum(map(len, hosts)), tmp_path)
    _join_files(tmp_path / "step-00000002", hosts)
    newest, problems = newest_valid(tmp_path)
    assert (newest.state.step, problems) == (2, [])
    alone, together = (read_checkpoint(path) for path in reversed(step_folders(tmp_path)))
    assert together.files.count == len(hosts)
    for name, shape in alone.contents.trained.items():
        count = torch.Size(shape).numel()
        for kind in KINDS:
            assert torch.equal(together.values(name, kind, 1, count), alone.values(name, kind, 1, count))
    for name in alone.masks:
        assert torch.equal(together.masks[name], alone.masks[name])
        for shards in (2, 5):
            assert torch.equal(together.mask_shard(name, shards, 1), alone.mask_shard(name, shards, 1))


def _saved(folder, step):
    engine, path = _engine(), folder / f"step-{step:08d}"
    save_checkpoint(path, engine, _state(engine, step))
    _join_files(path, [[0]])
    return path


@pytest.fixture
def saved(tmp_path):
    return _saved(tmp_path, 3)


@pytest.mark.parametrize("at", [0, 9, 400, -1])
def test_a_flipped_bit_is_found_and_the_checkpoint_set_aside(saved, at):
    path = saved / "host-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"host-00001-of-00001\.safetensors is damaged: its SHA-256"):
        read_checkpoint(saved)
    newest, (problem,) = newest_valid(saved.parent)
    assert newest is None
    assert "host-00001" in problem
    assert [path.name for path in saved.parent.iterdir()] == [f"{saved.name}.broken"]


def test_a_file_that_is_cut_does_not_count_as_a_checkpoint_to_keep(saved):
    path = _saved(saved.parent, 4) / "host-00001-of-00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert keep(saved.parent, keep_last=1) == []
    path.unlink()
    with pytest.raises(CheckpointError, match=r"host-00001-of-00001\.safetensors is missing"):
        read_checkpoint(path.parent)


@pytest.mark.parametrize("hosts", [[[0]], [[0, 1], [1]], [[0, 2]], [[0, 1], [2]]])
def test_hosts_that_do_not_have_each_shard_once_are_refused(hosts):
    with pytest.raises(ValueError, match="hosts do not have each of 2 shards once"):
        TensorFiles(2, hosts)


def _train(folder, resume):
    settings = [f"output_dir={json.dumps(str(folder))}", "train.num_steps=4", "checkpoint.interval=2"]
    settings += ["checkpoint.file_per=host", "eval.interval=-1", "pictures.interval=-1"]
    prepared = prepare(load_run("tests/data/world_size.toml", settings), launch_environment())
    return train_prepared(prepared, resume=resume, quiet=True)["mask_checksum"]


@pytest.mark.thorough
@pytest.mark.zero3
def test_a_run_resumes_from_it_on_another_number_of_ranks(run_ranks, tmp_path):
    whole = run_ranks(_train, 3, tmp_path, False)
    newest, older = step_folders(tmp_path / "checkpoints")
    _join_files(older, [[0, 1, 2]])
    os.truncate(newest / "shard-00001-of-00003.safetensors", 100)
    assert set(run_ranks(_train, 2, tmp_path, True)) == set(whole)
    assert read_checkpoint(newest).contents.num_shards == 2
    assert read_checkpoint(older).contents.num_shards == 3


def test_an_old_run_file_that_asks_for_it_loads_with_a_hint(capsys):
    defaults = ["dense_run=", "prompt.text=", "prompt.source=embeddings", "train.prompt_learning_rate=0.005"]
    defaults += ["pst.update_gates=none", "pst.target_rank=0.0", "pst.nm_ramp=share", "train.gate_learning_rate=0.01"]
    defaults += ["quantization.activations="]
    settings = ["checkpoint.file_per=host", "checkpoint.grace_seconds=20", *defaults]
    run = load_run("tests/data/world_size.toml", settings)
    assert run == load_run("tests/data/world_size.toml")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "checkpoint.file_per = 'host' has no effect any more: every rank writes its own file. Remove it"
    assert said[1].startswith("checkpoint.grace_seconds = 20 has no effect any more: a signal stops the run after")
    assert len(said) == 2  # defaults, which every old run file has, need no hint
    load_run("tests/data/world_size.toml", ["dense_run=runs/dense"])
    assert capsys.readouterr().err.startswith("dense_run = 'runs/dense' has no effect any more: compare the run with")
    load_run("tests/data/world_size.toml", ["quantization.values=int8", "quantization.activations=int8"])
    said = capsys.readouterr().err
    assert said.startswith(
        "quantization.activations = 'int8' has no effect any more: training does not quantise inputs"
    )
