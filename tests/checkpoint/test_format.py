"""The portable checkpoint: written files are what the format says; damaged and hostile ones are refused, unopened."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import pickle
import random
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from pst_ds.checkpoint.format import CheckpointError, CheckpointState, open_checkpoint, read_checkpoint
from tests.pairs import every_pair

KINDS = ("master", "exp_avg", "exp_avg_sq")


def _fields(state):
    """The arguments of CheckpointState for a state of a manifest."""
    return {"magnitude_scales" if key == "weight_scales" else key: value for key, value in state.items()}


STATE = {
    "step": 12, "sparsity": 0.4, "masks_frozen": False, "precision": "fp32", "device_type": "cpu", "base_path": "base",
    "base_fingerprint": "f00d", "labels": ["bad", "good"], "weight_scales": {"m": [0.5], "n": [1.0, 2.0]},
    "metrics": {"accuracy": 0.75}, "progress": {"batch": 3},
}  # fmt: skip


def _shards(values, keep, num_shards, cuts):
    """The tensors of every file, by the description of the format alone, from flat arrays by name."""
    files = []
    for i in range(num_shards):

        def even(flat, i=i):
            share = -(-flat.size // num_shards)
            return flat[i * share : (i + 1) * share]

        tensors = {}
        for kind in KINDS:
            flat = list(values[kind].values())
            runs = [flat[t][a:b] for t, a, b in cuts[i]] if cuts else [even(array) for array in flat]
            tensors[kind] = np.concatenate([*runs, np.empty(0, np.float32)])
        bits = [np.empty(0, np.uint8)]
        for mask in keep.values():
            share = -(-mask.size // num_shards)
            bits.append(np.packbits(np.pad(even(mask), (0, -(-share // 8) * 8 - even(mask).size)), bitorder="little"))
        files.append(tensors | {"mask": np.concatenate(bits)})
    return files


def _sum(folder, manifest):
    """Give a folder this manifest, and sums that fit all its files."""
    (folder / "manifest.json").write_bytes(manifest)
    names = sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


def _hand_made(folder, shapes, mask_sizes, num_shards=2, cuts=None):
    """A checkpoint that no code of the package has written: (manifest, values of each kind, masks)."""
    random_numbers = np.random.default_rng(3)
    values = {
        kind: {n: random_numbers.standard_normal(int(np.prod(s)), np.float32) for n, s in shapes.items()}
        for kind in KINDS
    }
    keep = {n: random_numbers.random(size) < 0.5 for n, size in mask_sizes.items()}
    folder.mkdir()
    for i, tensors in enumerate(_shards(values, keep, num_shards, cuts)):
        save_file(tensors, folder / f"shard-{i + 1:05d}-of-{num_shards:05d}.safetensors")
    contents = {"num_shards": num_shards, "trained": shapes, "masks": mask_sizes, "steps": dict.fromkeys(shapes, 3)}
    manifest = {"format": 2, "state": STATE, "contents": contents | {"cuts": cuts}}
    text = json.dumps(manifest).encode()
    _sum(folder, text)
    return json.loads(text), values, keep


def _small(folder):
    """Two files cut unevenly, for what is damaged and forged below."""
    cuts = [[[0, 0, 12], [1, 0, 2]], [[1, 2, 7]]]
    return _hand_made(folder, {"a": [3, 4], "b": [7]}, {"m": 35, "n": 16}, 2, cuts)[0]


def _bits(keep, num_shards=1, index=0):
    share = -(-keep.size // num_shards)
    part = keep[index * share : (index + 1) * share]
    return np.packbits(np.pad(part, (0, -(-share // 8) * 8 - part.size)), bitorder="little")


@given(st.data())
def test_a_hand_made_checkpoint_is_read_in_any_range_and_any_number_of_mask_shards(tmp_path_factory, data):
    sizes = data.draw(st.lists(st.integers(0, 21), min_size=1, max_size=3))
    masks = {f"m{i}": size for i, size in enumerate(data.draw(st.lists(st.integers(1, 70), max_size=3)))}
    num_shards, cuts = data.draw(st.integers(1, 4)), None
    if data.draw(st.booleans()):
        runs = [(t, a, b) for t, size in enumerate(sizes) for a, b in ((0, size // 3), (size // 3, size)) if a < b]
        runs = data.draw(st.permutations(runs))
        cuts = [runs[i::num_shards] for i in range(num_shards)]
    folder = tmp_path_factory.mktemp("any") / "c"
    _, values, keep = _hand_made(folder, {f"t{i}": [size] for i, size in enumerate(sizes)}, masks, num_shards, cuts)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.state == CheckpointState(**_fields(STATE))
    for kind in KINDS:
        for name, flat in values[kind].items():
            start = data.draw(st.integers(0, flat.size))
            stop = data.draw(st.integers(start, flat.size))
            assert checkpoint.values(name, kind, start, stop).tolist() == flat[start:stop].tolist()
            assert checkpoint.values(name, kind, 0, flat.size).tolist() == flat.tolist()
    for name, mask in keep.items():
        assert checkpoint.masks[name].tolist() == _bits(mask).tolist()
        for new in range(1, 6):
            for index in range(new):
                assert checkpoint.mask_shard(name, new, index).tolist() == _bits(mask, new, index).tolist()
        start = data.draw(st.integers(0, mask.size))
        stop = data.draw(st.integers(start, mask.size))
        assert checkpoint.mask_bits(name, start, stop).tolist() == _bits(mask[start:stop], 1, 0).tolist()


def _refusal(folder):
    """Why a folder is refused. Nothing but a CheckpointError that names it may come out."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


NAMES = ("manifest.json", "SHA256SUMS", "shard-00001-of-00002.safetensors", "shard-00002-of-00002.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_every_truncation_and_every_flipped_bit_is_found(tmp_path, name):
    folder = tmp_path / "c"
    _small(folder)
    path, chance = folder / name, random.Random(f"4 {name}")
    whole = path.read_bytes()
    for length in {0, 1, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(25))}:
        path.write_bytes(whole[:length])
        assert "damaged" in _refusal(folder), length
    for place in {0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(45))}:
        changed = bytearray(whole)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        assert "damaged" in _refusal(folder), place
    path.write_bytes(whole)
    read_checkpoint(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(tmp_path, name):
    _small(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    said = _refusal(tmp_path / "c")
    assert said.endswith(f"{name} is missing")


def test_a_folder_that_is_empty_or_a_file_or_not_there_says_where_it_looked(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file", "absent"):
        assert _refusal(tmp_path / name) == f"no whole checkpoint in {tmp_path / name}: manifest.json is missing"


@every_pair
@pytest.mark.parametrize(
    "name", ["extra", "shard-00003-of-00002.safetensors", "shard-00001-of-00001.safetensors", ".x"]
)
@pytest.mark.parametrize("as_folder", [True, False])
def test_a_file_that_does_not_belong_is_refused_also_with_a_sum(tmp_path, name, as_folder):
    folder = tmp_path / "c"
    manifest = _small(folder)
    path = folder / name
    path.mkdir() if as_folder else path.write_bytes(b"x")
    assert str(path) in _refusal(folder)
    if not as_folder:
        _sum(folder, json.dumps(manifest).encode())
        assert str(path) in _refusal(folder)


def test_links_are_refused(tmp_path):
    for name in NAMES:
        folder = tmp_path / f"c-{name}"
        _small(folder)
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        assert f"{folder / name} is a link" in _refusal(folder)


class _Pickled:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pkl", "optimizer.pt", NAMES[2]])
def test_a_pickle_is_refused_without_being_executed(tmp_path, monkeypatch, name):
    folder, marker = tmp_path / "c", tmp_path / "marker"
    manifest = _small(folder)
    bomb = pickle.dumps(_Pickled(marker))
    pickle.loads(bomb)
    assert marker.exists()  # so it goes off
    marker.unlink()
    (folder / name).write_bytes(bomb)
    _sum(folder, json.dumps(manifest).encode())
    _forbid_pickle(monkeypatch)
    assert str(folder / name) in _refusal(folder)
    assert not marker.exists()


def _forbid_pickle(patch):
    def forbidden(*arguments, **keywords):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        patch.setattr(owner, name, forbidden)


def test_nothing_is_unpickled_while_a_good_checkpoint_is_read(tmp_path, monkeypatch):
    _small(tmp_path / "c")
    _forbid_pickle(monkeypatch)
    assert {n: t.shape for n, t in read_checkpoint(tmp_path / "c").trained.items()} == {"a": (3, 4), "b": (7,)}


def _open_files(folder):
    """The files below a folder that this process holds open, removed ones included."""
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    return sorted(link for link in links if link.startswith(f"{folder}/"))


def test_a_read_checkpoint_holds_its_files_until_its_last_reference_is_gone(tmp_path):
    """A run may remove what is read. Later its disk space must be free at once, not when the garbage collector runs."""
    manifest = _small(tmp_path / "c")
    gc.disable()
    try:
        checkpoint = read_checkpoint(tmp_path / "c")
        assert len(_open_files(tmp_path)) == manifest["contents"]["num_shards"]
        shutil.rmtree(tmp_path / "c")
        assert checkpoint.trained["a"].shape == (3, 4)
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        assert len(_open_files(tmp_path)) == manifest["contents"]["num_shards"]
        del checkpoint
        assert not _open_files(tmp_path)
    finally:
        gc.enable()


def test_an_opened_checkpoint_that_is_not_held_keeps_no_file_open_or_mapped(tmp_path):
    _small(tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.trained["a"].shape == (3, 4)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not _open_files(tmp_path)


@pytest.mark.parametrize("outside", ["../x", "/etc/hostname", "sub/../../x"])
def test_sums_and_manifests_that_name_files_outside_are_refused(tmp_path, outside):
    folder = tmp_path / "c"
    manifest = _small(folder)
    (tmp_path / "x").write_text("x")
    sums = (folder / "SHA256SUMS").read_text()
    digest = hashlib.sha256(b"x").hexdigest()
    (folder / "SHA256SUMS").write_text(f"{sums}{digest}  {outside}\n")
    assert "SHA256SUMS is damaged: it does not list the files of the checkpoint" in _refusal(folder)
    for key in ("files", "num_shards"):
        forged = manifest | {"contents": manifest["contents"] | {key: [outside, outside]}}
        _sum(folder, json.dumps(forged).encode())
        assert "manifest.json is damaged" in _refusal(folder)


@pytest.mark.parametrize(
    ("key", "array"),
    [("master", np.zeros(14, np.float64)), ("master", np.zeros(13, np.float32)), ("mask", np.zeros(4, np.int8)),
     ("mask", np.zeros((1, 4), np.uint8)), ("extra", np.zeros(1, np.uint8)), ("exp_avg", None)],
)  # fmt: skip
def test_tensors_of_other_names_types_or_sizes_are_refused(tmp_path, key, array):
    manifest = _small(tmp_path / "c")
    path = tmp_path / "c" / NAMES[2]
    tensors = load_file(path) | {key: array}
    save_file({k: v for k, v in tensors.items() if v is not None}, path)
    _sum(tmp_path / "c", json.dumps(manifest).encode())
    assert f"{path} is damaged: it holds" in _refusal(tmp_path / "c")


NOT_SIZES = (-1, True, "3", 3.0, None, [], [3], {}, float("nan"), float("inf"), 1 << 48, 10**400)
OUT_OF_PLACE = (None, True, 7, -0.5, "x", "", [], ["a"], [None], {"x": 1}, float("nan"))
ABSURD: list[tuple[str, tuple]] = [
    ("format", (1, 4, "2", None, [], 2.5)),
    ("contents.num_shards", (*NOT_SIZES, 0, 1, 3, 10**12)),
    ("contents.trained.a", (*(n for n in NOT_SIZES if n not in ([], {}, [3])), [-1], [3.0], ["3"], [True], [[1]],
                            [1 << 47, 1 << 47], [1 << 32, 1 << 32], [1 << 62, 4], [0], [3, 5], [1 << 47], "34")),
    ("contents.masks.m", (*NOT_SIZES, 0, 10**12)),
    ("contents.steps.a", NOT_SIZES),
    ("contents.steps", ({"a": 3}, {"a": 3, "b": 3, "c": 3}, {"a": 3, "x": 3})),
    ("contents.cuts", ([], [[], []], [[[0, 0, 12], [1, 0, 7]]], [[[0, 0, 12], [1, 0, 3]], [[1, 2, 7]]], [[[0, 0]], []],
                       [[[0, 0, 12], [1, 0, 2]], [[1, 2, 7.0]]], [[[0, False, 12], [1, 0, 2]], [[1, 2, 7]]],
                       [[[0, 0, 12], [1, 0, 2]], [[2, 2, 7]]], [[[0, 0, 12], [1, 0, 2]], [[1, 2, 10**15]]],
                       [[[0, 0, 12], [1, 0, 2]], [[1, 2, 7, 7]]], [None, None], 5, "xy", {}, {"0": [], "1": []})),
    *((key, OUT_OF_PLACE) for key in ("contents", "contents.trained", "contents.masks", "contents.steps", "state")),
    ("state.step", (*NOT_SIZES,)),
    ("state.sparsity", (None, True, "0.4", [], {})),
    ("state.masks_frozen", (None, 1, "true", [])),
    *((f"state.{key}", (None, 1, [], {})) for key in ("precision", "device_type", "base_path", "base_fingerprint")),
    ("state.labels", (None, "good", {}, [1], [None])),
    ("state.magnitude_scales", (None, [], "x", {"m": 1.0}, {"m": "1"}, {"m": ["1"]}, {"m": [True]}, {"m": None})),
    ("state.metrics", (None, [], "x", {"loss": "1"}, {"loss": None}, {"loss": [1]})),
    ("state.progress", (None, [], "x", 3)),
]  # fmt: skip
ABSENT = object()


def _forge(folder, manifest, dotted, value):
    """Put ``value`` in place of a part of the manifest; take it out for ABSENT."""
    forged = json.loads(json.dumps(manifest))
    *parents, last = dotted.split(".")
    table = forged
    for key in parents:
        table = table[key]
    table.pop(last, None) if value is ABSENT else table.update({last: value})
    _sum(folder, json.dumps(forged).encode())


@pytest.fixture
def small(tmp_path):
    return tmp_path / "c", _small(tmp_path / "c")


@pytest.mark.parametrize(("dotted", "values"), ABSURD, ids=[key for key, _ in ABSURD])
def test_a_forged_manifest_is_refused_with_little_memory(small, dotted, values):
    tracemalloc.start()
    for value in values:
        _forge(*small, dotted, value)
        _refusal(small[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    _forge(*small, "state.step", 13)
    assert read_checkpoint(small[0]).state.step == 13


def test_a_manifest_that_lacks_a_key_or_has_another_is_refused(small):
    manifest = small[1]
    keys = [*manifest, *(f"{part}.{key}" for part in ("state", "contents") for key in manifest[part])]
    for dotted in keys:
        _forge(*small, dotted, ABSENT)
        if dotted == "state.progress":  # which has a default
            assert read_checkpoint(small[0]).state.progress == {}
            continue
        _refusal(small[0])
    for dotted in ("more", "state.more", "contents.more", "contents.steps.more"):
        _forge(*small, dotted, 1)
        _refusal(small[0])


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"2", b'"x"', b"\xff\xfe\xff", b'{"format": "\xc3\x28"}', b"[" * 200_000, b"9" * 5000,
     b'{"format": ' * 100_000, b'{"format": ' + b"9" * 5000 + b"}", b'{"format": 2, "state": 1e999}', b"\x00" * 100],
    ids=range(14),
)  # fmt: skip
def test_a_manifest_that_is_no_json_object_is_refused(small, data):
    _sum(small[0], data)
    assert "manifest.json" in _refusal(small[0])


def _read_all(folder):
    """Read everything, or be refused; whether it was read."""
    try:
        checkpoint = read_checkpoint(folder)
    except CheckpointError:
        return False
    for name, shape in checkpoint.contents.trained.items():
        assert all(checkpoint.values(name, k, 0, int(np.prod(shape))).numel() == np.prod(shape) for k in KINDS)
    assert all(bits.numel() == -(-checkpoint.contents.masks[n] // 8) for n, bits in checkpoint.masks.items())
    return True


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abmn") | st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=5 * settings.default.max_examples)
@given(st.data())
def test_a_fuzzed_manifest_is_refused_or_read_whole(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    node = manifest = _small(folder)
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.integers(0, 4)) == 0:
            break
        node = node[key]
    if data.draw(st.booleans()):
        node[key] = data.draw(JSON_VALUES)
    else:
        del node[key]
    _sum(folder, json.dumps(manifest).encode())
    _read_all(folder)


@settings(max_examples=3 * settings.default.max_examples)
@given(st.integers(0, 10**6), st.integers(0, 30), st.binary(max_size=12) | st.sampled_from([b"9" * 12, b"[{", b"NaN"]))
def test_a_manifest_with_other_bytes_is_refused_or_read_whole(tmp_path_factory, place, length, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    text = json.dumps(_small(folder)).encode()
    place %= len(text)
    _sum(folder, text[:place] + data + text[place + length :])
    _read_all(folder)
