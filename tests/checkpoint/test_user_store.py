"""The store of personal states: whole or not at all, really gone, and what does not belong in it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from pst_ds.checkpoint import user_store as store_module
from pst_ds.checkpoint.user_store import INDEX, STATES, Common, UserNameError, UserStore, UserStoreError
from tests.pairs import every_pair

COMMON = Common(
    form="masked", task="classification", labels=["no", "yes"], base_path="base", base_fingerprint="ab",
    masks_sha256={"a": "cd"}, shared_sha256="ef", beta=1.0, dtype="fp32", shapes={"a.pst_U": [3, 2], "head.bias": [2]},
)  # fmt: skip


def _state(value=0.0):
    return {"a.pst_U": torch.full((3, 2), value), "head.bias": torch.arange(2.0) + value}


@pytest.fixture
def store(tmp_path):
    made = UserStore.create(tmp_path / "store", COMMON)
    made.add("Ann", _state(1.0), rows=7, steps=3, loss=0.5)
    made.add("Blade Runner: 2049 ü", _state(2.0))
    return made


def _files(store):
    return sorted(path.name for path in (store.folder / STATES).iterdir())


def test_states_come_back_as_they_went_in(store):
    again = UserStore(store.folder)
    assert again.names == ["Ann", "Blade Runner: 2049 ü"]
    assert (again.entry("Ann").rows, again.entry("Ann").steps, again.entry("Ann").loss) == (7, 3, 0.5)
    for name, value in (("Ann", 1.0), ("Blade Runner: 2049 ü", 2.0)):
        state = again.state(name)
        assert all(torch.equal(state[key], tensor) for key, tensor in _state(value).items())
        assert state.keys() == _state().keys()


def test_a_user_that_is_written_again_has_the_new_values_and_one_file(store):
    assert float(store.state("Ann")["a.pst_U"][0, 0]) == 1.0  # in memory
    other = UserStore(store.folder)  # another process
    other.add("Ann", _state(5.0))
    store.add("Cid", _state())
    assert float(store.state("Ann")["a.pst_U"][0, 0]) == 5.0
    assert len(_files(store)) == len(store) == 3


def test_what_another_process_did_is_taken_over(store):
    served = UserStore(store.folder)
    assert float(served.latest_state("Ann")["a.pst_U"][0, 0]) == 1.0
    store.add("Ann", _state(5.0))
    store.add("Cid", _state(6.0))
    assert float(served.latest_state("Cid")["a.pst_U"][0, 0]) == 6.0
    assert float(served.latest_state("Ann")["a.pst_U"][0, 0]) == 5.0
    store.remove("Ann")
    with pytest.raises(UserNameError, match="no user 'Ann'"):
        served.latest_state("Ann")
    assert "Ann" not in served.names
    (store.folder / INDEX).unlink()
    with pytest.raises(UserStoreError, match="does not exist"):
        served.latest_state("Cid")


def test_a_state_that_is_replaced_between_index_and_file(store, monkeypatch):
    served, read = UserStore(store.folder), UserStore._read

    def late(self, name, entry):
        monkeypatch.setattr(UserStore, "_read", read)
        store.add("Ann", _state(5.0))
        return read(self, name, entry)

    monkeypatch.setattr(UserStore, "_read", late)
    assert float(served.latest_state("Ann")["a.pst_U"][0, 0]) == 5.0


def test_a_removed_user_is_gone_from_index_disk_and_memory(store):
    store.state("Ann")
    before = set(_files(store))
    store.remove("Ann")
    assert len(before - set(_files(store))) == 1
    assert "Ann" not in (store.folder / INDEX).read_text()
    with pytest.raises(UserStoreError, match=r"no user 'Ann'; there is 'Blade Runner"):
        store.state("Ann")
    with pytest.raises(UserStoreError, match="no user"):
        store.remove("Ann")


@every_pair
@pytest.mark.parametrize(("code", "size"), [("BF16", 2), ("I8", 1), ("F64", 8), ("F32", 4)])
@pytest.mark.parametrize("spaces", [0, 1])
def test_a_state_of_another_dtype_is_refused_and_of_another_alignment_read(store, code, size, spaces):
    """As a stranger may have written it, with a SHA-256 in the index that agrees."""
    values = {"a.pst_U": ([3, 2], 6), "head.bias": ([2], 2)}
    header, end = {}, 0
    for name, (shape, count) in values.items():
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + count * size]}
        end += count * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + spaces)
    data = len(text).to_bytes(8, "little") + text + bytes(end)
    entry = store.entry("Ann")
    (store.folder / STATES / entry.file).write_bytes(data)
    index = (store.folder / INDEX).read_text()
    (store.folder / INDEX).write_text(index.replace(entry.sha256, hashlib.sha256(data).hexdigest()))
    if code == "F32":
        assert UserStore(store.folder).state("Ann")["a.pst_U"].tolist() == [[0.0, 0.0]] * 3
    else:
        with pytest.raises(UserStoreError, match=r"does not fit .*a\.pst_U is torch\..*, not fp32"):
            UserStore(store.folder).state("Ann")


def test_files_of_a_write_that_was_cut_short_do_not_stay(store):
    (store.folder / STATES / f"{'0' * 32}-{'1' * 16}.safetensors").write_bytes(b"left over")
    assert len(UserStore(store.folder)) == 2
    store.add("Cid", _state())
    assert len(_files(store)) == 3


def test_an_index_that_a_killed_process_left_names_no_removed_user(store):
    left = store.folder / f".{INDEX}.0123abcd.partial"
    left.write_bytes((store.folder / INDEX).read_bytes())
    store.remove("Ann")
    assert not [path for path in store.folder.rglob("*") if path.is_file() and b"Ann" in path.read_bytes()]
    assert {path.name for path in store.folder.iterdir()} == {INDEX, STATES}


def test_a_store_whose_creation_was_killed_can_be_made_later(tmp_path):
    (tmp_path / f".{INDEX}.0123abcd.partial").write_bytes(b"{")
    UserStore.create(tmp_path, COMMON).add("Ann", _state())
    assert {path.name for path in tmp_path.iterdir()} == {INDEX, STATES}


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def _fails_at(monkeypatch, number):
    """The disk is full at the ``number``-th file or folder that is waited for."""
    calls, fsync = iter(range(1000)), os.fsync

    def failing(handle):
        if next(calls) == number:
            raise OSError(*NO_SPACE.args)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)


@every_pair
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("name", ["Ann", "Cid"])
def test_a_full_disk_is_one_message_and_loses_nobody(store, monkeypatch, name, number):
    with monkeypatch.context() as patch:
        _fails_at(patch, number)  # the state, its folder, the index, its folder
        with pytest.raises(UserStoreError, match=f"^{store.folder} cannot be written: .*No space left on device"):
            store.add(name, _state(9.0))
    again = UserStore(store.folder)
    assert len(_files(store)) == len(again)
    assert {name: float(again.state(name)["head.bias"][0]) for name in again.names} in (
        {"Ann": 1.0, "Blade Runner: 2049 ü": 2.0},
        {"Ann": 1.0, "Blade Runner: 2049 ü": 2.0, name: 9.0},
    )
    assert {path.name for path in store.folder.iterdir()} == {INDEX, STATES}
    store.add(name, _state(9.0))
    assert float(UserStore(store.folder).state(name)["head.bias"][0]) == 9.0


@pytest.mark.parametrize("number", range(2))
def test_a_store_that_could_not_be_made_can_be_made_later(tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        _fails_at(patch, number)
        with pytest.raises(UserStoreError, match=r"cannot be written: .*No space left on device"):
            UserStore.create(tmp_path / "store", COMMON)
    UserStore.create(tmp_path / "store", COMMON).add("Ann", _state(1.0))
    assert UserStore(tmp_path / "store").names == ["Ann"]


def test_memory_keeps_the_last_states_used(tmp_path):
    UserStore.create(tmp_path, COMMON)
    store = UserStore(tmp_path, kept=2)
    for name in "abc":
        store.add(name, _state())
        store.state(name)
    held = store.state("c")
    shutil.rmtree(store.folder / STATES)
    assert store.state("c") is held
    with pytest.raises(UserStoreError, match="cannot be read"):
        store.state("a")


@pytest.mark.parametrize("name", ["", " ", "..", "a/b", "/etc/passwd", "a\\b", "a\nb", "x" * 201])
def test_a_name_that_is_a_path_or_no_name_is_refused(store, name):
    with pytest.raises(UserStoreError, match="the user name"):
        store.add(name, _state())
    with pytest.raises(UserStoreError, match="the user name"):
        store.state(name)
    assert len(store) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_fingerprint": "other"}, "do not match the base model"),
        ({"masks_sha256": {"a": "other"}}, "do not match the masks"),
        ({"shared_sha256": "other"}, "do not match the shared training"),
        ({"form": "beside"}, "form = 'masked'"),
        ({"labels": ["yes", "no"]}, "labels"),
        ({"shapes": {"a.pst_U": [3, 4], "head.bias": [2]}}, r"a.pst_U of shape \[3, 2\]"),
        ({"shapes": {"a.pst_U": [3, 2]}}, r"head.bias of shape \[2\], and None"),
    ],
)
def test_states_of_another_model_are_refused(store, change, message):
    with pytest.raises(UserStoreError, match=message):
        UserStore.create(store.folder, replace(COMMON, **change))
    assert len(UserStore(store.folder)) == 2


def test_a_state_of_other_shapes_is_refused(store):
    with pytest.raises(UserStoreError, match="does not fit"):
        store.add("Cid", {**_state(), "more": torch.zeros(1)})
    assert "Cid" not in store


def test_a_damaged_state_costs_its_user_alone(store):
    path = store.folder / STATES / store.entry("Ann").file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    fresh = UserStore(store.folder)
    with pytest.raises(UserStoreError, match=r"user 'Ann' is damaged.*train it again"):
        fresh.state("Ann")
    fresh.state("Blade Runner: 2049 ü")
    fresh.add("Ann", _state(3.0))
    assert float(fresh.state("Ann")["a.pst_U"][0, 0]) == 3.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-40],
        lambda text: "[" * 100_000,
        lambda text: text.replace('"format": 1', '"format": 9'),
        lambda text: text.replace('"masked"', '"mask"'),
        lambda text: text.replace('"rows": 7', '"rows": "7"'),
        lambda text: json.dumps({**json.loads(text), "users": {"a": {}}}),
        lambda text: text.replace("states", "x").replace('"file": "', '"file": "../../'),
        lambda text: text.replace('"Ann"', '"a/b"'),
    ],
)
def test_a_damaged_index_is_one_message_and_nothing_is_lost(store, damage):
    path = store.folder / INDEX
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserStoreError, match=r"index\.json") as caught:
        UserStore(store.folder)
    assert not isinstance(caught.value, UserNameError)  # a server takes that for a name that the store lacks
    assert len(_files(store)) == 2


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserStoreError, match="does not exist"):
        UserStore(tmp_path)
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserStoreError, match="not empty"):
        UserStore.create(tmp_path, COMMON)


def test_two_processes_that_make_a_store_at_once_make_one(tmp_path, monkeypatch):
    def late(*arguments):
        monkeypatch.undo()
        UserStore.create(tmp_path / "store", COMMON).add("Ann", _state(1.0))  # by the other one
        return store_module.only_writer(*arguments)

    monkeypatch.setattr(store_module, "only_writer", late)
    UserStore.create(tmp_path / "store", COMMON).add("Bob", _state(2.0))
    assert UserStore(tmp_path / "store").names == ["Ann", "Bob"]
