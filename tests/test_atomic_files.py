"""Files and folders that are whole or not there, whichever call fails and whenever the process is killed."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds import atomic_files as durable
from pst_ds.atomic_files import (
    atomic_folder,
    publish,
    replace_link,
    require_writable,
    restore_replaced,
    write_new,
    write_pieces,
    write_text_atomic,
)
from pst_ds.errors import InputError


def _full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


def _failing_at(patch, owner, name, number):
    """Let call ``number`` (from 0) of ``owner.name`` fail; returns the calls made so far."""
    original, calls = getattr(owner, name), []

    def failing(*arguments, **keywords):
        calls.append(arguments)
        return _full() if len(calls) == number + 1 else original(*arguments, **keywords)

    patch.setattr(owner, name, failing)
    return calls


def _tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _make(folder, content):
    """A folder of two files, one of them deeper."""
    with atomic_folder(folder) as partial:
        write_new(partial / "a", content)
        (partial / "sub").mkdir()
        write_new(partial / "sub" / "b", content * 2)


def _made(content):
    return {"a": content, "sub/b": content * 2}


@given(st.binary(max_size=3000))
def test_a_new_file_has_the_bytes_and_their_sum(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("new") / "file"
    assert write_new(path, data) == hashlib.sha256(data).hexdigest() == durable.file_sha256(path)
    assert path.read_bytes() == data


@given(st.lists(st.binary(max_size=300), max_size=5))
def test_pieces_follow_each_other_in_a_file(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("new") / "file"
    digest = write_pieces(path, (memoryview(piece) for piece in pieces))
    assert path.read_bytes() == b"".join(pieces)
    assert digest == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_a_disk_that_gives_back_other_bytes_is_noticed(tmp_path, monkeypatch):
    order = []
    fsync, read = os.fsync, durable.file_sha256
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])

    def rotten(path):
        order.append("read")
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        return read(path)

    monkeypatch.setattr(durable, "file_sha256", rotten)
    with pytest.raises(OSError, match=r"file was read back with other bytes than were written; the disk is failing"):
        write_new(tmp_path / "file", b"content")
    assert order == ["fsync", "read"]


@pytest.mark.parametrize("owner_and_name", [(os, "fsync"), (Path, "replace"), (Path, "open"), (Path, "symlink_to")])
@pytest.mark.parametrize("number", [0, 1])
def test_text_and_links_are_the_old_or_the_new_ones_after_an_error(tmp_path, owner_and_name, number):
    text, link = tmp_path / "text", tmp_path / "link"
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write_text_atomic(text, "old")
    replace_link(link, "one")
    failed = 0
    for change, look, old, new in (
        (lambda: write_text_atomic(text, "new"), text.read_text, "old", "new"),
        (lambda: replace_link(link, "two"), lambda: str(link.readlink()), "one", "two"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            calls = _failing_at(patch, *owner_and_name, number)
            try:
                change()
            except OSError:
                failed += 1
                assert look() in (old, new)
                if owner_and_name[1] != "fsync":  # the last of which comes after the rename
                    assert look() == old
            else:
                assert len(calls) <= number
                assert look() == new
        change()  # what the failure left is not in the way
        assert look() == new
    if number == 0:
        assert failed
    assert {p.name for p in tmp_path.iterdir()} == {"text", "link", "one", "two"}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_the_file_that_it_names_is_replaced(tmp_path, there):
    (tmp_path / "deeper").mkdir()
    target, link = tmp_path / "deeper" / "text", tmp_path / "link"
    link.symlink_to("deeper/text")
    if there:
        target.write_text("old")
    write_text_atomic(link, "new")
    assert str(link.readlink()) == "deeper/text"
    assert target.read_text() == "new"
    assert _tree(tmp_path) == {"link": b"new", "deeper/text": b"new"}


def test_a_device_and_a_pipe_are_written_to_and_a_folder_is_refused(tmp_path):
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    write_text_atomic(fifo, "through the pipe")
    assert os.read(reader, 100) == b"through the pipe"
    os.close(reader)
    assert fifo.is_fifo()
    link.symlink_to("/dev/null")
    write_text_atomic(link, "into nothing")
    assert Path("/dev/null").is_char_device()
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        write_text_atomic(tmp_path / "folder", "text")
    assert {p.name for p in tmp_path.iterdir()} == {"fifo", "link", "folder"}


def test_an_error_leaves_nothing_beside_the_file(tmp_path, monkeypatch):
    write_text_atomic(tmp_path / "text", "old")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(tmp_path / "text", "new")
    assert _tree(tmp_path) == {"text": b"old"}


@pytest.mark.parametrize("older", [True, False])
def test_a_link_to_a_folder_stays_one_and_the_folder_that_it_names_is_replaced(tmp_path, older):
    link, target = tmp_path / "link", tmp_path / "disk" / "c"
    link.symlink_to("disk/c")
    if older:
        _make(target, b"old")
    for content in (b"new", b"newer"):
        _make(link, content)
        assert str(link.readlink()) == "disk/c"
        assert _tree(target) == _made(content)
        assert [p.name for p in target.parent.iterdir()] == ["c"]


def test_a_link_can_be_read_at_every_moment_of_its_replacement(tmp_path, monkeypatch):
    replace_link(tmp_path / "link", "one")
    seen = []
    for owner, name in ((Path, "replace"), (Path, "symlink_to"), (Path, "unlink"), (os, "fsync")):
        original = getattr(owner, name)

        def spied(*arguments, original=original, **keywords):
            seen.append(str((tmp_path / "link").readlink()))
            result = original(*arguments, **keywords)
            seen.append(str((tmp_path / "link").readlink()))
            return result

        monkeypatch.setattr(owner, name, spied)
    replace_link(tmp_path / "link", "two")
    assert set(seen) == {"one", "two"}
    assert seen == sorted(seen)  # never back


def test_a_finished_folder_replaces_the_older_and_leaves_nothing_beside_it(tmp_path):
    _make(tmp_path / "c", b"old")
    assert _tree(tmp_path) == {f"c/{name}": data for name, data in _made(b"old").items()}
    _make(tmp_path / "c", b"new")
    assert _tree(tmp_path) == {f"c/{name}": data for name, data in _made(b"new").items()}


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("owner_and_name", [(os, "fsync"), (Path, "rename"), (Path, "open"), (Path, "mkdir")])
def test_an_error_at_any_call_leaves_the_older_folder_and_nothing_else(tmp_path, owner_and_name, older):
    folder, failures = tmp_path / "c", 0
    for number in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if older:
            _make(folder, b"old")
        with pytest.MonkeyPatch.context() as patch:
            calls = _failing_at(patch, *owner_and_name, number)
            try:
                _make(folder, b"new")
            except OSError:
                failures += 1
            else:
                assert len(calls) <= number
                break
        renamed = owner_and_name[1] == "fsync" and folder.exists() and _tree(folder) == _made(b"new")
        if not renamed:  # else the last call failed, that waits until the new name is on disk
            assert _tree(tmp_path) == ({f"c/{name}": data for name, data in _made(b"old").items()} if older else {})
        _make(folder, b"again")
        assert _tree(tmp_path) == {f"c/{name}": data for name, data in _made(b"again").items()}
    assert failures >= 1 + (older and owner_and_name[1] == "rename")
    assert _tree(folder) == _made(b"new")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_of_the_writer_leaves_the_older_folder_and_nothing_else(tmp_path, error):
    _make(tmp_path / "c", b"old")

    def write():
        with atomic_folder(tmp_path / "c") as partial:
            write_new(partial / "a", b"half")
            raise error

    with pytest.raises(error):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert _tree(tmp_path / "c") == _made(b"old")


class _Killed(BaseException):
    """Stands for the end of the process: no handler of errors of the disk sees it."""


@pytest.mark.parametrize("again", ["restore_replaced", "atomic_folder"])
def test_a_kill_between_the_two_renames_is_repaired(tmp_path, monkeypatch, again):
    folder = tmp_path / "c"
    _make(folder, b"old")
    partial = tmp_path / "c.partial"
    partial.mkdir()
    (partial / "a").write_bytes(b"new")
    rename = Path.rename

    def killed(self, target):
        if self == partial:
            raise _Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(_Killed):
            publish(partial, folder)
    assert not folder.exists()  # this is what the kill leaves
    assert _tree(tmp_path / "c.old") == _made(b"old")
    if again == "restore_replaced":
        restore_replaced(folder)
        assert _tree(folder) == _made(b"old")
        assert not (tmp_path / "c.old").exists()
        restore_replaced(folder)  # and does nothing where nothing is to be done
        assert _tree(folder) == _made(b"old")
    else:
        with pytest.raises(OSError, match="No space"), atomic_folder(folder):
            _full()
        assert _tree(tmp_path) == {f"c/{name}": data for name, data in _made(b"old").items()}


def test_a_kill_after_both_renames_leaves_the_newer(tmp_path):
    _make(tmp_path / "c", b"new")
    _make(tmp_path / "c.old", b"old")
    restore_replaced(tmp_path / "c")
    assert _tree(tmp_path) == {f"c/{name}": data for name, data in _made(b"new").items()}


def _killed_while_writing(folder, chunks):
    """SIGKILL a child once it has written ``chunks`` chunks; how it ended."""
    ready, say = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with atomic_folder(folder) as partial, (partial / "a").open("wb") as stream:
                for i in range(100):
                    stream.write(bytes([i]) * 1000)
                    stream.flush()
                    os.write(say, b".")
                    if i + 1 == chunks:
                        signal.pause()
        finally:
            os._exit(1)
    os.close(say)
    said = 0
    while said < chunks:
        said += len(os.read(ready, chunks - said)) or pytest.fail("the child ended by itself")
    os.kill(pid, signal.SIGKILL)
    os.close(ready)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("chunks", [1, 37])
def test_a_killed_process_leaves_no_folder_of_the_name_and_the_next_begins_anew(tmp_path, older, chunks):
    if older:
        _make(tmp_path / "c", b"old")
    assert _killed_while_writing(tmp_path / "c", chunks) == -signal.SIGKILL
    assert (tmp_path / "c.partial" / "a").stat().st_size == chunks * 1000  # it was really on its way
    assert (tmp_path / "c").exists() == older
    if older:
        assert _tree(tmp_path / "c") == _made(b"old")
    _make(tmp_path / "c", b"new")
    assert _tree(tmp_path) == {f"c/{name}": data for name, data in _made(b"new").items()}


def test_what_cannot_be_made_is_said_before_it_is_tried(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for there in ("", "new", "new/deeper/still", "file"):
        require_writable(tmp_path / there, "--out x")
    with pytest.raises(InputError, match=r"^--out x cannot be written: .*/file is a file, .*name a place elsewhere"):
        require_writable(tmp_path / "file" / "a" / "b", "--out x")
    monkeypatch.setattr(os, "access", lambda place, mode: False)  # as for a user who is not root
    with pytest.raises(InputError, match=rf"no permission to write in {tmp_path}; name a place elsewhere"):
        require_writable(tmp_path / "new", "--out x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
