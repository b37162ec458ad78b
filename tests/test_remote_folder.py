"""Remote folders: files go there and come back, faults are retried, and what cannot be opened is one message."""

from __future__ import annotations

import hashlib
import sys

import pytest
from fsspec.registry import _registry

from pst_ds import remote_folder
from pst_ds.errors import InputError
from pst_ds.remote_folder import RemoteError, RemoteFolder, is_address
from tests.s3_server import s3_bucket


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket() as address:
        yield address


@pytest.fixture(params=["path", "file", "memory", pytest.param("s3", marks=pytest.mark.thorough)])
def address(request, tmp_path):
    """A local path, its URL, a folder in memory, and one of an object store."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"
    kinds = {"path": str(tmp_path / "far"), "file": f"file://{tmp_path}/far", "memory": f"memory://{tmp_path.name}"}
    return kinds[request.param]


@pytest.fixture
def _no_pauses(monkeypatch):
    monkeypatch.setattr(remote_folder, "_PAUSES_SECONDS", (0.0, 0.0))


def test_what_is_written_is_read_listed_and_removed(address, tmp_path):
    folder = RemoteFolder(address, "here")
    folder.require_usable(writable=True)
    assert folder.names() == []
    (tmp_path / "local").write_bytes(b"12345")
    folder.put(tmp_path / "local", "a/file")
    folder.write("a/text", b"whole")
    assert folder.names() == ["a"]
    assert folder.names("a") == ["file", "text"]
    assert folder.names("nothing") == []
    assert folder.read("a/text") == b"whole"
    assert folder.get("a/file", tmp_path / "back") == hashlib.sha256(b"12345").hexdigest()
    assert (tmp_path / "back").read_bytes() == b"12345"
    assert folder.size("a/file") == 5
    assert (folder.exists("a/file"), folder.exists("a/other")) == (True, False)
    folder.remove("a/file", "a/other")
    folder.remove_folder("a")
    assert folder.names() == []


def test_a_file_is_replaced(address, tmp_path):
    folder = RemoteFolder(address, "here")
    for data in (b"one", b"another"):
        (tmp_path / "local").write_bytes(data)
        folder.put(tmp_path / "local", "file")
        folder.write("text", data)
        assert folder.read("file") == folder.read("text") == data


@pytest.mark.usefixtures("_no_pauses")
def test_a_fault_is_tried_again_and_a_lasting_one_is_an_error(tmp_path, monkeypatch):
    folder = RemoteFolder(str(tmp_path), "here")
    calls = []

    def failing(*_):
        calls.append(1)
        raise ConnectionResetError("the store is away")

    read = folder._files.cat_file
    (tmp_path / "a").write_text("text")
    monkeypatch.setattr(folder._files, "cat_file", lambda path: failing() if len(calls) < 2 else read(path))
    assert folder.read("a") == b"text"
    monkeypatch.setattr(folder._files, "cat_file", failing)
    with pytest.raises(RemoteError, match=f"cannot read {tmp_path}/a: the store is away"):
        folder.read("a")
    assert len(calls) == 2 + 3


def test_a_missing_file_is_not_tried_again(tmp_path):
    with pytest.raises(FileNotFoundError):
        RemoteFolder(str(tmp_path), "here").read("a")


def test_an_address_has_a_protocol():
    assert is_address("s3://bucket/a")
    assert not is_address("a/b")
    assert not is_address("C:/b")


def test_an_unknown_protocol_is_refused():
    with pytest.raises(InputError, match=r"here = 'far://a' cannot be opened: Protocol not known: far\. Name an"):
        RemoteFolder("far://a", "here")


@pytest.mark.parametrize(("address", "package", "extra"), [("s3://b/a", "s3fs", "s3"), ("gs://b/a", "gcsfs", "gcs")])
def test_a_missing_package_is_named(monkeypatch, address, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    # fsspec keeps the classes that it has imported
    monkeypatch.delitem(_registry, address.partition(":")[0], raising=False)
    with pytest.raises(InputError, match=rf"needs a package that is not .* pip install 'pst-ds\[{extra}\]'"):
        RemoteFolder(address, "here")


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"here = .*/file/a' cannot be written: .*Correct the address"):
        RemoteFolder(f"{tmp_path}/file/a", "here").require_usable(writable=True)
