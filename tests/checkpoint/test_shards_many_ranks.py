"""A checkpoint that 2,048 ranks wrote: what a rank asks the file system for, and what is read again."""

from __future__ import annotations

import hashlib
import os
import shutil

import pytest
import torch
from safetensors.torch import save

from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointState, Contents, listed_files, manifest_bytes, sums_text
from pst_ds.checkpoint.retention import keep, newest_valid, step_name
from pst_ds.checkpoint.shards import ChunkedTensors, shard_name
from pst_ds.file_names import step_folders

RANKS = 2048
TRAINED = {f"layers.{i}.pst_{factor}": (9, 2) for i in range(7) for factor in "ABUV"}
MASKS = {f"layers.{i}": 81 for i in range(7)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    contents = Contents(RANKS, TRAINED, MASKS, dict.fromkeys(TRAINED, 1))
    state = CheckpointState(1, 0.5, True, "bf16", "cpu", "base", "f00d", [], {}, {}, progress={"best_step": None})
    checkpoint = Checkpoint(folder, state, contents)
    path = folder / step_name(1)
    path.mkdir()
    sums = {}
    for file in range(RANKS):
        values = torch.zeros(checkpoint._tensors.length(file))
        masks = torch.zeros(len(MASKS), dtype=torch.uint8)
        data = save({"master": values, "exp_avg": values.clone(), "exp_avg_sq": values.clone(), "mask": masks})
        (path / shard_name(file, RANKS)).write_bytes(data)
        sums[shard_name(file, RANKS)] = hashlib.sha256(data).hexdigest()
    manifest = manifest_bytes(state, contents)
    (path / "manifest.json").write_bytes(manifest)
    (path / "SHA256SUMS").write_text(sums_text(sums | {"manifest.json": hashlib.sha256(manifest).hexdigest()}))
    return folder


def test_it_is_whole(folder):
    checkpoint, problems = newest_valid(folder)
    assert not problems
    assert checkpoint is not None
    assert checkpoint._open == {}  # as many open files as ranks would be more than a process may have


def test_a_rank_asks_for_its_own_file_and_what_lists_them(folder, monkeypatch):
    names = [path.name for path in step_folders(folder)], listed_files(folder / step_name(1))
    told, calls = iter(names), []
    monkeypatch.setattr(checkpoints, "of_main", lambda action: next(told))
    monkeypatch.setattr(checkpoints, "world_size", lambda: RANKS)
    monkeypatch.setattr(checkpoints, "rank", lambda: 7)
    monkeypatch.setattr(checkpoints, "all_gather_objects", lambda value: [value])
    monkeypatch.setattr(checkpoints, "check_sums", lambda path, sums: calls.extend(sums))
    for name in ("stat", "lstat", "scandir", "listdir", "open"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, call=original, **more: (calls.append(args), call(*args, **more))[1])
    checkpoint, problems = newest_valid(folder)
    assert checkpoint is not None
    assert not problems
    assert shard_name(6, RANKS) in calls  # its share of the files, after the manifest
    assert len(calls) <= 10


def test_what_is_known_to_be_good_is_not_read_again(folder, tmp_path, monkeypatch):
    for step in (1, 2, 3):
        shutil.copytree(folder / step_name(1), tmp_path / step_name(step), copy_function=os.link)
    read, original = [], Checkpoint.check_file
    monkeypatch.setattr(Checkpoint, "check_file", lambda self, file: (read.append(file), original(self, file))[1])
    known = {step_name(3): None}
    assert keep(tmp_path, 2, known) == [step_name(1)]
    assert len(read) == RANKS
    assert known == {step_name(3): None, step_name(2): None}
    assert keep(tmp_path, 2, known) == []
    assert len(read) == RANKS


@pytest.mark.parametrize("files", [1, 2, 3, 7, 64])
def test_lengths_are_those_of_the_fragments(files):
    tensors = ChunkedTensors({"a": 5, "b": 5, "c": 12, "d": 0, "e": 100}, files)
    held = [0] * files
    for name, size in tensors.sizes.items():
        for fragment in tensors.fragments(name, 0, size):
            held[fragment.file] += fragment.stop - fragment.start
    assert [tensors.length(file) for file in range(files)] == held
