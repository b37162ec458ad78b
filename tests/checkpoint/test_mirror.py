"""Mirrors of checkpoints: what is copied, when it counts, what is kept, and what comes back."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from pst_ds import remote_folder
from pst_ds.checkpoint import retention
from pst_ds.checkpoint.format import MANIFEST, read_checkpoint
from pst_ds.checkpoint.mirror import CheckpointMirror, copies, fetch_newer
from pst_ds.parallel.ranks import rank
from pst_ds.remote_folder import RemoteError, RemoteFolder
from tests.checkpoint.small_engine import save_as_ranks, trained_engine

WAIT_SECONDS = 60.0


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote_folder, "_PAUSES_SECONDS", (0.0,))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints after steps 1 to 4, of two files each."""
    folder = tmp_path_factory.mktemp("saved")
    engine, _ = trained_engine()
    for step in range(1, 5):
        progress = {"best_step": 2 if step > 1 else None}
        save_as_ranks(folder / f"step-{step:08d}", engine, 2, progress=progress)
    return folder


@pytest.fixture
def local(saved, tmp_path):
    """The folder of a run, without checkpoints."""
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def remote(tmp_path):
    return RemoteFolder(str(tmp_path / "mirror"), "checkpoint.mirror")


def _name(step):
    return f"step-{step:08d}"


def _add(mirror, saved, local, step):
    (local / _name(step)).mkdir()
    for path in (saved / _name(step)).iterdir():
        (local / _name(step) / path.name).write_bytes(path.read_bytes())
    mirror.add(_name(step))


def _copied(mirror):
    assert mirror.wait(WAIT_SECONDS)
    return [(result.name, result.error) for result in mirror.results()]


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_is_copied_whole(saved, local, remote, tmp_path):
    mirror = CheckpointMirror(local, remote, lambda: None)
    _add(mirror, saved, local, 1)
    assert _copied(mirror) == [(_name(1), "")]
    assert _files(tmp_path / "mirror") == _files(local)
    assert copies(remote) == [_name(1)]
    assert mirror.results() == []


def test_a_copy_counts_once_its_manifest_is_there(saved, local, remote, tmp_path, monkeypatch):
    seen = []
    put = RemoteFolder.put

    def watched(self, path, name):
        seen.append(copies(self))
        put(self, path, name)

    monkeypatch.setattr(RemoteFolder, "put", watched)
    mirror = CheckpointMirror(local, remote, lambda: None)
    _add(mirror, saved, local, 1)
    assert _copied(mirror) == [(_name(1), "")]
    # a second copy over a complete one, as by a run that resumed before it: not valid before it is whole
    mirror.add(_name(1))
    assert _copied(mirror) == [(_name(1), "")]
    assert seen == [[]] * 4
    assert _files(tmp_path / "mirror") == _files(local)


def test_the_mirror_keeps_what_the_run_keeps(saved, local, remote):
    known = {}
    mirror = CheckpointMirror(local, remote, lambda: retention.keep(local, 1, known, mirror.in_use()))
    remote.write("notes.txt", b"of the user")
    for step in range(1, 5):
        known[_name(step)] = 2 if step > 1 else None
        _add(mirror, saved, local, step)
        assert _copied(mirror) == [(_name(step), "")]
    assert copies(remote) == [_name(4), _name(2)]
    assert [path.name for path in retention.step_folders(local)] == [_name(4), _name(2)]
    assert remote.names() == ["notes.txt", _name(2), _name(4)]


def test_a_slow_copy_delays_nobody_and_the_newest_is_next(saved, local, remote, monkeypatch):
    """The store does not take a byte before the run has written three more checkpoints."""
    has_begun = threading.Event()
    is_free = threading.Event()
    put = RemoteFolder.put

    def blocked(self, path, name):
        has_begun.set()
        assert is_free.wait(WAIT_SECONDS)
        put(self, path, name)

    monkeypatch.setattr(RemoteFolder, "put", blocked)
    known = dict.fromkeys(map(_name, range(1, 5)))
    mirror = CheckpointMirror(local, remote, lambda: retention.keep(local, 1, known, mirror.in_use()))
    _add(mirror, saved, local, 1)
    assert has_begun.wait(WAIT_SECONDS)
    for step in (2, 3, 4):
        _add(mirror, saved, local, step)
        retention.keep(local, 1, known, mirror.in_use())
    assert not mirror.wait(0.0)
    # nothing that is being copied or waits for it was removed
    assert [path.name for path in retention.step_folders(local)] == [_name(4), _name(3), _name(2), _name(1)]
    is_free.set()
    assert _copied(mirror) == [(_name(1), ""), (_name(4), "")]
    assert copies(remote) == [_name(4)]
    assert [path.name for path in retention.step_folders(local)] == [_name(4)]


def test_a_copy_that_fails_leaves_the_one_before(saved, local, remote, monkeypatch):
    mirror = CheckpointMirror(local, remote, lambda: None)
    _add(mirror, saved, local, 1)
    assert _copied(mirror) == [(_name(1), "")]
    with monkeypatch.context() as patch:

        def failing(*_):
            raise OSError("the store is full")

        patch.setattr(remote._files, "put_file", failing)
        _add(mirror, saved, local, 2)
        ((name, error),) = _copied(mirror)
    assert name == _name(2)
    assert "rank 0: cannot write" in error
    assert "the store is full" in error
    assert copies(remote) == [_name(1)]
    _add(mirror, saved, local, 3)
    assert _copied(mirror) == [(_name(3), "")]
    assert copies(remote) == [_name(3), _name(1)]  # step 2 was removed: it was not complete


def _filled(remote, saved, local, *steps):
    mirror = CheckpointMirror(local, remote, lambda: None)
    for step in steps:
        _add(mirror, saved, local, step)
        assert _copied(mirror) == [(_name(step), "")]


def _emptied(local):
    for path in sorted(local.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_the_newest_and_the_best_come_back(saved, local, remote):
    _filled(remote, saved, local, 1, 2, 3)
    before = _files(local / _name(3))
    _emptied(local)
    assert fetch_newer(remote, local, -1) == (True, [])
    assert _files(local / _name(3)) == before
    assert [path.name for path in retention.step_folders(local)] == [_name(3), _name(2)]
    for step in (3, 2):
        read_checkpoint(local / _name(step))


def test_nothing_comes_back_that_is_not_newer(saved, local, remote):
    _filled(remote, saved, local, 1, 2)
    _emptied(local)
    assert fetch_newer(remote, local, 2) == (False, [])
    assert list(local.iterdir()) == []


@pytest.mark.parametrize("file", ["shard-00002-of-00002.safetensors", "SHA256SUMS", MANIFEST])
def test_a_damaged_copy_is_passed_over(saved, local, remote, tmp_path, file):
    _filled(remote, saved, local, 1, 3)
    _emptied(local)
    damaged = tmp_path / "mirror" / _name(3) / file
    data = bytearray(damaged.read_bytes())
    data[5] ^= 1
    damaged.write_bytes(data)
    is_newer, (problem,) = fetch_newer(remote, local, -1)
    assert is_newer
    assert "mirror/step-00000003" in problem
    assert [path.name for path in retention.step_folders(local)] == [_name(1)]


def test_a_missing_file_is_named(saved, local, remote, tmp_path):
    _filled(remote, saved, local, 1)
    _emptied(local)
    (tmp_path / "mirror" / _name(1) / "shard-00001-of-00002.safetensors").unlink()
    is_newer, (problem,) = fetch_newer(remote, local, -1)
    assert not is_newer
    assert "shard-00001-of-00002.safetensors is damaged" in problem


def test_a_store_that_does_not_answer_is_an_error_and_not_a_start_from_nothing(saved, local, remote, monkeypatch):
    _filled(remote, saved, local, 1)
    _emptied(local)

    def failing(*_, **__):
        raise ConnectionResetError("no route to the store")

    monkeypatch.setattr(remote._files, "cat_file", failing)
    with pytest.raises(RemoteError, match="no route to the store"):
        fetch_newer(remote, local, -1)


def _mirrored_by_two_ranks(address, local, fails_on):
    remote = RemoteFolder(address, "checkpoint.mirror")
    own = []
    put = remote.put

    def recorded(path, name):
        if rank() == fails_on:
            raise OSError("no space")
        own.append(name)
        put(path, name)

    remote.put = recorded
    mirror = CheckpointMirror(local, remote, lambda: None)
    mirror.add(_name(1))
    copied = _copied(mirror)
    torch.distributed.barrier()
    fetched = None
    if not copied[0][1]:
        fetched = fetch_newer(remote, local.parent / "fetched", -1)
    return own, copied, fetched


@pytest.mark.zero3
def test_each_rank_copies_its_own_file(run_ranks, saved, local, tmp_path):
    _filled(RemoteFolder(f"{tmp_path}/first", "here"), saved, local, 1)
    outcomes = run_ranks(partial(_mirrored_by_two_ranks, f"{tmp_path}/mirror", local, None), 2)
    names = [f"{_name(1)}/shard-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert outcomes == [([name], [(_name(1), "")], (True, [])) for name in names]
    assert _files(tmp_path / "mirror") == _files(tmp_path / "first") == _files(tmp_path / "fetched")


@pytest.mark.zero3
def test_a_rank_that_cannot_copy_is_named_on_all(run_ranks, saved, local, tmp_path):
    _filled(RemoteFolder(f"{tmp_path}/first", "here"), saved, local, 1)
    outcomes = run_ranks(partial(_mirrored_by_two_ranks, f"{tmp_path}/mirror", local, 1), 2)
    assert [copied for _, copied, _ in outcomes] == [[(_name(1), "rank 1: no space")]] * 2
    assert copies(RemoteFolder(f"{tmp_path}/mirror", "here")) == []
