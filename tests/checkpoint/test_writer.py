"""Checkpoints that engines write: what is in them, what they fit, and what a full or failing disk leaves behind."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pst_ds.checkpoint import own_part
from pst_ds.checkpoint import writer as checkpoint_writer
from pst_ds.checkpoint.format import CheckpointError, CheckpointState, read_checkpoint
from pst_ds.checkpoint.restore import load_into, weight_scales
from pst_ds.checkpoint.writer import CheckpointWriter, save_checkpoint, size_limit
from pst_ds.config.pst import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import optimizer_state
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.ranks import barrier, is_main, rank
from tools.bench.timing import status_bytes

KINDS = ("master", "exp_avg", "exp_avg_sq")


class _Net(torch.nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(12, 9), torch.nn.Linear(9, width)])
        self.classifier = torch.nn.Linear(width, 2)

    def forward(self, x):
        return self.classifier(torch.tanh(self.layers[1](torch.tanh(self.layers[0](x)))))


def _model(width=12, num_shards=1, **settings):
    torch.manual_seed(0)
    return inject_pst(_Net(width), PSTConfig(**settings), num_shards=num_shards)


def _trained(seed=1, dtype=torch.float32):
    """An engine after three steps with random masks; and the masks."""
    model = _model().to(dtype)
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


def _state(model, **changes):
    return CheckpointState(
        **{
            "step": 12, "sparsity": 0.4, "masks_frozen": False, "precision": "fp32", "device_type": "cpu",
            "base_path": "base", "base_fingerprint": "f00d", "labels": ["bad", "good"],
            "weight_scales": weight_scales(model), "metrics": {"accuracy": 0.75}, "progress": {"batch": 3}, **changes,
        }
    )  # fmt: skip


class _OneAfterAnother:
    """The group of ranks that save in this process, the last first."""

    def __init__(self, reports, world):
        self.reports, self.world = reports, world

    def decide(self, report, decision):
        self.reports.insert(0, report)
        return decision(self.reports) if len(self.reports) == self.world else ("", 0)


def _save(folder, engine, world=1, copies=True, **changes):
    """Save as ``world`` ranks that all hold everything; what rank 0 says of it."""
    reports = []
    for own in reversed(range(world)):
        with pytest.MonkeyPatch.context() as patch:
            for module in (checkpoint_writer, own_part):
                patch.setattr(module, "rank", lambda own=own: own)
                patch.setattr(module, "world_size", lambda: world)
            patch.setattr(checkpoint_writer, "StoreGroup", lambda beside: _OneAfterAnother(reports, world))
            writer = CheckpointWriter(folder.parent, engine)
            writer.save(folder.name, _state(engine.module, **changes), copies=copies)
            written = writer.wait()
    assert written.error == ""
    return written


def _named(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def _optimizer_values(engine):
    """Flat copies of what the optimizer holds of every trainable value, by kind and name."""
    masters = {n: getattr(p, "fp32_master", p) for n, p in _named(engine.module).items()}
    state = engine.optimizer.state
    found = {"master": masters} | {k: {n: state[m][k] for n, m in masters.items()} for k in KINDS[1:]}
    return {kind: {n: t.detach().flatten().clone() for n, t in of_kind.items()} for kind, of_kind in found.items()}


def _assert_holds(folder, values, keep):
    checkpoint = read_checkpoint(folder)
    assert list(checkpoint.trained) == list(values["master"])
    for kind, of_kind in values.items():
        for name, flat in of_kind.items():
            assert torch.equal(checkpoint.values(name, kind, 0, flat.numel()), flat), (kind, name)
    for name, mask in keep.items():
        assert checkpoint.masks[name].tolist() == np.packbits(mask, bitorder="little").tolist()
    return checkpoint


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_the_masters_moments_and_masks_whatever_the_number_of_ranks(tmp_path, world, dtype, copies):
    engine, keep = _trained(dtype=dtype)
    folder = tmp_path / "step-00000012"
    written = _save(folder, engine, world, copies)
    values, named = _optimizer_values(engine), _named(engine.module)
    assert all(of_kind["classifier.weight"].all() for of_kind in values.values())
    checkpoint = _assert_holds(folder, values, keep)
    assert checkpoint.state == _state(engine.module)
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


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_what_is_saved_is_loaded_whatever_the_number_of_shards(tmp_path, world, num_shards):
    engine, _ = _trained()
    _save(tmp_path / "c", engine, world)
    fresh, x = _model(num_shards=num_shards), torch.ones(12)
    for layer in pst_layers(fresh).values():
        layer.weight_scales = (99.0,)
    assert not torch.equal(fresh(x), engine(x))
    load_into(fresh, read_checkpoint(tmp_path / "c"))
    values = dict(fresh.named_parameters())
    for name, param in engine.module.named_parameters():
        assert name.endswith("pst_mask") or torch.equal(values[name], param), name
    assert weight_scales(fresh) == weight_scales(engine.module)
    assert torch.equal(fresh(x), engine(x))  # masks and all


def test_a_newer_checkpoint_replaces_the_older_also_of_other_ranks(tmp_path):
    _save(tmp_path / "c", _trained()[0], world=3)
    newer, _ = _trained(seed=5)
    _save(tmp_path / "c", newer, world=2, step=99)
    checkpoint = read_checkpoint(tmp_path / "c")
    assert (checkpoint.state.step, checkpoint.contents.num_shards) == (99, 2)
    assert torch.equal(checkpoint.trained["classifier.weight"], newer.module.classifier.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def _refusal(call, *arguments):
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    return str(caught.value)


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
    _save(tmp_path / "c", _trained()[0])
    model = _model(**settings)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    message = _refusal(model, read_checkpoint(tmp_path / "c"))
    assert message.startswith(str(tmp_path / "c"))
    assert reason in message
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("where", ["masks", "weight_scales"])
def test_masks_and_scales_of_other_layers_are_refused(tmp_path, where):
    _save(tmp_path / "c", _trained()[0])
    checkpoint = read_checkpoint(tmp_path / "c")
    table = checkpoint.contents.masks if where == "masks" else checkpoint.state.weight_scales
    table["layers.2"] = table.pop("layers.1")
    said = {"masks": "masks differ in layers.1, layers.2", "weight_scales": "weight_scales are those of other layers"}
    assert said[where] in _refusal(_model(), checkpoint)


@pytest.mark.parametrize("leftover", ["shard-00003-of-00003.safetensors", "SHA256SUMS", "x.pt"])
def test_what_a_killed_save_of_other_ranks_left_does_not_get_into_the_next(tmp_path, leftover):
    engine, keep = _trained()
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / leftover).write_bytes(b"x" * 10**6)
    _save(tmp_path / "c", engine, world=2)
    _assert_holds(tmp_path / "c", _optimizer_values(engine), keep)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def _failing(patch, owner, name, number, error):
    """Call ``number`` (from 0) of ``owner.name`` raises."""
    original, calls = getattr(owner, name), iter(range(1000))

    def call(*arguments, **keywords):
        if next(calls) == number:
            raise error
        return original(*arguments, **keywords)

    patch.setattr(owner, name, call)


NO_SPACE = OSError(28, "No space left on device")
FAILURES = {  # name: (rank, owner of the function, its name, which call, error, what is said)
    "the shard of rank 1": (1, checkpoint_writer, "write_pieces", 0, NO_SPACE, f"rank 1: {NO_SPACE}"),
    "the shard of rank 0": (0, checkpoint_writer, "write_pieces", 0, NO_SPACE, f"rank 0: {NO_SPACE}"),
    "the manifest": (0, checkpoint_writer, "write_new", 0, NO_SPACE, f"rank 0: {NO_SPACE}"),
    "the sums": (0, checkpoint_writer, "write_new", 1, NO_SPACE, f"rank 0: {NO_SPACE}"),
    "the name": (0, checkpoint_writer, "publish", 0, NO_SPACE, f"rank 0: {NO_SPACE}"),
    "the rename": (0, Path, "rename", 0, NO_SPACE, f"rank 0: {NO_SPACE}"),
    "the folder": (1, Path, "mkdir", 0, NO_SPACE, f"rank 1: {NO_SPACE}"),
    "memory of rank 1": (
        1,
        checkpoint_writer,
        "tensor_bytes",
        1,
        MemoryError("no room"),
        "rank 1: MemoryError: no room",
    ),
    "memory of rank 0": (
        0,
        checkpoint_writer,
        "tensor_bytes",
        1,
        MemoryError("no room"),
        "rank 0: MemoryError: no room",
    ),
    "a state that is no JSON": (0, checkpoint_writer, "manifest_bytes", 0, TypeError("set"), "rank 0: TypeError: set"),
}


def _fail_everywhere(folder):
    """[what failed, what was said, what was left, whether the older was whole, what the next save said] of a rank."""
    engine, _ = _trained(seed=1)
    writer, found = CheckpointWriter(folder, engine), []
    for name, (failing_rank, owner, function, number, error, _) in FAILURES.items():
        writer.save("older", _state(engine.module, step=1))
        assert writer.wait().error == ""
        with pytest.MonkeyPatch.context() as patch:
            if rank() == failing_rank:
                _failing(patch, owner, function, number, error)
            writer.save("newer", _state(engine.module, step=2), when_written=lambda: pytest.fail("not written"))
            written = writer.wait()
        barrier()
        left, older = sorted(p.name for p in folder.iterdir()), read_checkpoint(folder / "older").state.step
        barrier()
        writer.save("newer", _state(engine.module, step=3))
        again = writer.wait()
        step = read_checkpoint(folder / "newer").state.step
        barrier()
        if is_main():
            shutil.rmtree(folder / "newer")
        found.append((name, written.error, written.bytes, left, older, again.error, step))
    return found


@pytest.mark.zero3
def test_a_failing_disk_is_told_on_every_rank_and_leaves_the_older_checkpoint(run_ranks, tmp_path):
    one, other = run_ranks(_fail_everywhere, 2, tmp_path / "c")
    assert one == other
    for name, said, size, left, older, again, step in one:
        assert (said, size, left, older, again, step) == (FAILURES[name][-1], 0, ["older"], 1, "", 3), name
    assert len(one) == len(FAILURES)


def _links_fail(folder):
    """What a rank hears when all is written and the links cannot be made, and of the save after it."""
    engine, _ = _trained()
    writer, said = CheckpointWriter(folder, engine), []
    for error in (NO_SPACE, ValueError("odd")):

        def when_written(error=error):
            raise error

        writer.save("c", _state(engine.module), when_written=when_written)
        said.append(writer.wait().error)
        assert read_checkpoint(folder / "c").state == _state(engine.module)
    return said


@pytest.mark.zero3
def test_an_error_after_the_last_rename_is_told_on_every_rank_and_the_checkpoint_is_there(run_ranks, tmp_path):
    wanted = [f"rank 0: {NO_SPACE}", "rank 0: ValueError: odd"]
    assert run_ranks(_links_fail, 2, tmp_path / "c") == [wanted, wanted]


def test_save_checkpoint_raises_what_went_wrong(tmp_path, monkeypatch):
    engine, _ = _trained()
    _failing(monkeypatch, checkpoint_writer, "write_pieces", 0, NO_SPACE)
    with pytest.raises(OSError, match=r"c could not be written: rank 0: .*No space left on device"):
        save_checkpoint(tmp_path / "c", engine, _state(engine.module))
    save_checkpoint(tmp_path / "c", engine, _state(engine.module))
    assert read_checkpoint(tmp_path / "c").state == _state(engine.module)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, with room for a few checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"{' '.join(mount)}: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full_costs_the_newest_checkpoint_only(small_disk):
    engine, keep = _trained()
    writer, values, said = CheckpointWriter(small_disk, engine), _optimizer_values(engine), ""
    whole = []
    while not said:
        writer.save(f"step-{len(whole):08d}", _state(engine.module))
        said = writer.wait().error
        whole += [] if said else [f"step-{len(whole):08d}"]
        assert sorted(p.name for p in small_disk.iterdir()) == whole
    assert said.startswith("rank 0: [Errno 28] No space left on device")
    assert len(whole) > 1
    for name in whole:
        _assert_holds(small_disk / name, values, keep)
    shutil.rmtree(small_disk / whole[0])
    writer.save("after", _state(engine.module))
    assert writer.wait().error == ""
    _assert_holds(small_disk / "after", values, keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_save_waits(tmp_path, monkeypatch, dtype):
    engine, keep = _trained(dtype=dtype)
    writer, go, written = CheckpointWriter(tmp_path, engine), threading.Event(), []
    write, join, fragments = checkpoint_writer.write_pieces, threading.Thread.join, optimizer_state.local_fragments

    def blocked(path, pieces):
        assert go.wait(60)
        return write(path, pieces)

    monkeypatch.setattr(checkpoint_writer, "write_pieces", blocked)
    before = _optimizer_values(engine)
    writer.save("one", _state(engine.module))
    assert writer.wait(0.0) is None
    engine.backward(engine(torch.ones(4, 12, dtype=dtype)).float().square().sum())
    engine.step()
    for layer in pst_layers(engine.module).values():
        layer.pst_mask.data.zero_()
    after = _optimizer_values(engine)
    assert not (tmp_path / "one").exists()

    def let_go_and_join(self, timeout=None):
        go.set()
        return join(self, timeout)

    def local_fragments(*arguments):
        written.append((tmp_path / "one").exists())  # the second save begins to copy
        return fragments(*arguments)

    monkeypatch.setattr(threading.Thread, "join", let_go_and_join)
    monkeypatch.setattr(optimizer_state, "local_fragments", local_fragments)
    writer.save("two", _state(engine.module))
    assert written == [True]
    assert writer.wait().name == "two"
    assert writer.wait() is None  # it is told once
    _assert_holds(tmp_path / "one", before, keep)
    _assert_holds(tmp_path / "two", after, {name: np.zeros(108, bool) for name in keep})
    for kind in KINDS:
        assert not torch.equal(before[kind]["classifier.weight"], after[kind]["classifier.weight"])


def test_a_second_save_copies_into_the_memory_of_the_first(tmp_path, torch_bytes):
    engine, _ = _trained()
    writer = CheckpointWriter(tmp_path, engine)
    size = 12 * sum(p.numel() for p in _named(engine.module).values())
    first, kept = torch_bytes(lambda: (writer.save("one", _state(engine.module)), writer.wait()))
    assert size <= kept <= first < 2 * size
    most, kept = torch_bytes(lambda: (writer.save("two", _state(engine.module)), writer.wait()))
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
    writer.save("c", _state(model), copies=copies)
    assert writer.wait().error == ""
    assert status_bytes("VmHWM") - before < most * size


def test_after_a_save_without_a_copy_the_next_has_one(tmp_path):
    engine, keep = _trained()
    writer = CheckpointWriter(tmp_path, engine)
    writer.save("as-it-lies", _state(engine.module), copies=False)
    assert writer.wait().error == ""
    values = _optimizer_values(engine)
    writer.save("copied", _state(engine.module))
    engine.module.classifier.weight.data.zero_()
    assert writer.wait().error == ""
    for name in ("as-it-lies", "copied"):
        _assert_holds(tmp_path / name, values, keep)
