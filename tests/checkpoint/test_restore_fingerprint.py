"""Which base model a checkpoint belongs to: by the bytes of a folder, or the revision of a name on the hub."""

from __future__ import annotations

import pytest

from pst_ds.checkpoint import restore as checkpoint_model
from pst_ds.checkpoint.restore import base_fingerprint, same_base


def test_the_fingerprint_follows_names_sizes_and_bytes(tmp_path):
    assert base_fingerprint(tmp_path) == ""
    (tmp_path / "notes.txt").write_text("x")
    assert base_fingerprint(tmp_path) == ""
    seen = set()
    for name, data in (("a", b"1"), ("a", b"2"), ("a", b"12"), ("b", b"1"), ("c", bytes(5 << 20))):
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        seen.add(base_fingerprint(tmp_path))
    for place in (0, (4 << 20) - 1, (5 << 20) - 1):
        changed = bytearray(5 << 20)
        changed[place] = 1
        (tmp_path / "c.safetensors").write_bytes(changed)
        seen.add(base_fingerprint(tmp_path))
    assert len(seen) == 8


def test_of_a_large_file_a_sample_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_model, "_READ_WHOLE", 1 << 20)
    data, found = bytearray(5 << 20), []
    for place in (None, 10, (4 << 20) + 10, 2 << 20):
        if place is not None:
            data[place] = 1
        (tmp_path / "model.safetensors").write_bytes(data)
        found.append(base_fingerprint(tmp_path))
    assert len(set(found[:3])) == 3
    assert found[3] == found[2]  # between two samples


def test_a_model_on_the_hub_is_known_by_its_revision(tmp_path, monkeypatch):
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--who--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    (repo / "snapshots" / revision).mkdir(parents=True)
    (repo / "snapshots" / revision / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert base_fingerprint("who/model") == f"hub:{revision}"
    assert base_fingerprint("who/other") == ""
    assert base_fingerprint("no such: name") == ""


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("a1", "a1", True), ("a1", "b2", False), ("hub:1", "hub:1", True), ("hub:1", "hub:2", False),
     ("hub:1", "a1", True), ("", "a1", False), ("", "", True)],
)  # fmt: skip
def test_only_fingerprints_of_one_kind_can_differ(one, other, same):
    assert same_base(one, other) is same
    assert same_base(other, one) is same
