"""Checkpoints with one file for the ranks of each host: the same values, found the same way, and whole or not there."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pst_ds.checkpoint import host_file
from pst_ds.checkpoint.file_names import TensorFiles
from pst_ds.checkpoint.format import CheckpointError, CheckpointState, read_checkpoint
from pst_ds.checkpoint.restore import weight_scales
from pst_ds.checkpoint.retention import clean_up, keep, newest_valid, step_folders
from pst_ds.checkpoint.writer import CheckpointWriter, save_checkpoint
from pst_ds.config.pst import PSTConfig
from pst_ds.config.toml import load_run
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.launch import launch_environment
from pst_ds.parallel.optimizer_state import KINDS
from pst_ds.parallel.ranks import barrier, is_main, rank, world_size
from pst_ds.train.run import prepare, train_run


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
        base_fingerprint="f00d", labels=[], weight_scales=weight_scales(engine.module), metrics={},
    )  # fmt: skip


def _on_hosts(patch, *hosts):
    """Let rank i be on the i-th of ``hosts``."""
    patch.setattr(host_file.socket, "gethostname", lambda: hosts[rank()])


def _save_both_ways(folder, hosts):
    with pytest.MonkeyPatch.context() as patch:
        _on_hosts(patch, *hosts)
        engine = _engine()
        for step, of_host in ((1, False), (2, True)):
            save_checkpoint(folder / f"step-{step:08d}", engine, _state(engine, step), file_of_host=of_host)
        newest, problems = newest_valid(folder)
    return newest.state.step, problems


@pytest.mark.zero3
@pytest.mark.parametrize("hosts", [("a", "a"), ("a", "b", "a")], ids="".join)
def test_ranks_of_a_host_write_one_file_with_what_each_would_have_written_alone(run_ranks, tmp_path, hosts):
    assert run_ranks(_save_both_ways, len(hosts), tmp_path, hosts) == [(2, [])] * len(hosts)
    alone, together = (read_checkpoint(path) for path in reversed(step_folders(tmp_path)))
    assert together.files.count == len(set(hosts))
    names = [f"host-{i + 1:05d}-of-{together.files.count:05d}.safetensors" for i in range(together.files.count)]
    assert {path.name for path in together.folder.iterdir()} == {"manifest.json", "SHA256SUMS", *names}
    assert json.loads((together.folder / "manifest.json").read_text())["format"] == 4
    assert json.loads((alone.folder / "manifest.json").read_text())["format"] == 3
    for file, name in enumerate(names):
        shared = load_file(together.folder / name)
        for shard in together.files.shards(file):
            own = load_file(alone.folder / alone.files.name(shard))
            assert own.keys() == {key.partition("/")[0] for key in shared}
            assert all(torch.equal(shared[f"{key}/{shard}"], values) for key, values in own.items())
    for name, shape in alone.contents.trained.items():
        count = torch.Size(shape).numel()
        for kind in KINDS:
            assert torch.equal(together.values(name, kind, 1, count), alone.values(name, kind, 1, count))
    for name in alone.masks:
        assert torch.equal(together.masks[name], alone.masks[name])
        for shards in (2, 5):
            assert torch.equal(together.mask_shard(name, shards, 1), alone.mask_shard(name, shards, 1))


@pytest.fixture
def saved(tmp_path):
    engine = _engine()
    save_checkpoint(tmp_path / "step-00000003", engine, _state(engine, 3), file_of_host=True)
    return tmp_path / "step-00000003"


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
    engine = _engine()
    save_checkpoint(saved.with_name("step-00000004"), engine, _state(engine, 4), file_of_host=True)
    path = saved.with_name("step-00000004") / "host-00001-of-00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert keep(saved.parent, keep_last=1) == []
    path.unlink()
    with pytest.raises(CheckpointError, match=r"host-00001-of-00001\.safetensors is missing"):
        read_checkpoint(path.parent)


@pytest.mark.parametrize("hosts", [[[0]], [[0, 1], [1]], [[0, 2]], [[0, 1], [2]]])
def test_hosts_that_do_not_have_each_shard_once_are_refused(hosts):
    with pytest.raises(ValueError, match="hosts do not have each of 2 shards once"):
        TensorFiles(2, hosts)


def _fails_on(own, folder, hosts):
    """What every rank hears when rank ``own`` cannot write, when it reads other bytes back, and of a third save."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        _on_hosts(patch, *hosts)
        engine = _engine()
        saver = CheckpointWriter(folder, engine, file_of_host=True)
        for name, fails in (("pwrite", OSError(28, "No space left on device")), ("pread", None)):
            with pytest.MonkeyPatch.context() as broken:
                if rank() == own:
                    broken.setattr(host_file.os, name, _raising(fails) if fails else lambda *_: b"other")
                saver.save("step-00000005", _state(engine, 5))
                said.append(saver.wait().error)
            barrier()
            said.append(sorted(path.name for path in folder.iterdir()))
            barrier()
        saver.save("step-00000005", _state(engine, 5))
        said.append(saver.wait().error)
    return said


def _raising(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.zero3
@pytest.mark.parametrize("own", [0, 1])
def test_a_disk_that_fails_on_one_rank_is_told_on_all_and_leaves_nothing(run_ranks, tmp_path, own):
    (tmp_path / "c").mkdir()
    one, other = run_ranks(_fails_on, 2, own, tmp_path / "c", ("a", "a"))
    assert one == other
    assert one[0] == f"rank {own}: [Errno 28] No space left on device"
    assert one[2].startswith(f"rank {own}: ")
    assert one[2].endswith("was read back with other bytes than were written; the disk is failing")
    assert (one[1], one[3], one[4]) == ([], [], "")
    assert read_checkpoint(tmp_path / "c" / "step-00000005").state.step == 5


def _killed_while_it_writes(folder):
    """Save a step; then rank 1 dies after its first bytes of the next."""
    with pytest.MonkeyPatch.context() as patch:
        _on_hosts(patch, *["a"] * world_size())
        engine = _engine()
        save_checkpoint(folder / "step-00000001", engine, _state(engine, 1), file_of_host=True)
        pwrite = os.pwrite

        def dies(handle, data, place):
            pwrite(handle, b"\xff" * len(data), place)
            os.kill(os.getpid(), signal.SIGKILL)

        if rank() == 1:
            patch.setattr(host_file.os, "pwrite", dies)
        save_checkpoint(folder / "step-00000002", engine, _state(engine, 2), file_of_host=True)


def _goes_on(folder, cleaned):
    """Save the step again; unless it is ``cleaned`` up, what is left over lies in the way."""
    if cleaned and is_main():
        clean_up(folder)
    barrier()
    newest, problems = newest_valid(folder)
    engine = _engine()
    save_checkpoint(folder / "step-00000002", engine, _state(engine, 2), file_of_host=True)
    return newest.state.step, problems


@pytest.mark.zero3
@pytest.mark.parametrize("cleaned", [True, False])
def test_a_rank_killed_while_it_writes_leaves_the_older_checkpoint_and_other_ranks_go_on(run_ranks, tmp_path, cleaned):
    with pytest.raises(AssertionError, match="ended without a result"):
        run_ranks(_killed_while_it_writes, 2, tmp_path / "c")
    assert [path.name for path in step_folders(tmp_path / "c")] == ["step-00000001"]
    assert (tmp_path / "c" / "step-00000002.partial").is_dir()
    assert run_ranks(_goes_on, 3, tmp_path / "c", cleaned) == [(1, [])] * 3
    assert read_checkpoint(tmp_path / "c" / "step-00000002").contents.num_shards == 3


def _train(folder, resume):
    settings = [f"output_dir={json.dumps(str(folder))}", "train.num_steps=4", "checkpoint.interval=2"]
    settings += ["checkpoint.file_per=host", "eval.interval=-1", "pictures.interval=-1"]
    prepared = prepare(load_run("tests/data/world_size.toml", settings), launch_environment())
    return train_run(prepared, resume=resume, quiet=True)["mask_checksum"]


@pytest.mark.zero3
def test_a_run_goes_on_from_it_on_another_number_of_ranks(run_ranks, tmp_path):
    whole = run_ranks(_train, 3, tmp_path, False)
    newest, older = step_folders(tmp_path / "checkpoints")
    assert {path.name for path in newest.glob("*.safetensors")} == {"host-00001-of-00001.safetensors"}
    os.truncate(newest / "host-00001-of-00001.safetensors", 100)
    assert set(run_ranks(_train, 2, tmp_path, True)) == set(whole)
    assert read_checkpoint(newest).contents.num_shards == 2
    assert read_checkpoint(older).contents.num_shards == 3
