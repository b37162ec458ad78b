"""Files and folders that are whole or not there, whichever call fails and whenever the process is killed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import math
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds import atomic_files as durable
from pst_ds.atomic_files import (
    atomic_file,
    atomic_folder,
    only_writer,
    publish,
    replace_link,
    require_writable,
    restore_replaced,
    write_new,
    write_pieces,
    write_text_atomic,
)
from pst_ds.errors import InputError
from tests.pairs import every_pair


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


@every_pair
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


@every_pair
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
        shutil.rmtree(partial)
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


@every_pair
@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("chunks", [1, 37])
def test_a_killed_process_leaves_no_folder_of_the_name_and_the_next_begins_anew(tmp_path, older, chunks):
    if older:
        _make(tmp_path / "c", b"old")
    assert _killed_while_writing(tmp_path / "c", chunks) == -signal.SIGKILL
    (partial,) = tmp_path.glob(".c.*.partial")
    assert (partial / "a").stat().st_size == chunks * 1000  # it was really on its way
    assert (tmp_path / "c").exists() == older
    if older:
        assert _tree(tmp_path / "c") == _made(b"old")
    _make(tmp_path / "c", b"new")
    assert _tree(tmp_path) == {f"c/{name}": data for name, data in _made(b"new").items()}


def _writes(path, kind, content):
    """A process that writes ``content`` to ``path`` in two steps; (its pid, a pipe with what it prints, "." once it has
    begun, and a pipe that it waits for)."""
    heard, say = os.pipe()
    wait, go = os.pipe()
    pid = os.fork()
    if pid:
        os.close(say)
        os.close(wait)
        return pid, heard, go
    code = 1
    os.close(go)
    try:
        sys.stderr = os.fdopen(say, "w")
        with (atomic_folder if kind == "folder" else atomic_file)(path) as partial:
            part = partial / "a" if kind == "folder" else partial
            part.write_bytes(content)
            print(".", file=sys.stderr, flush=True)
            os.read(wait, 1)
            if kind == "folder":
                (partial / "b").write_bytes(content)
            else:
                part.write_bytes(part.read_bytes() + content)
        code = 0
    finally:
        os._exit(code)


def _finish(writer):
    os.write(writer[2], b"!")
    assert os.waitstatus_to_exitcode(os.waitpid(writer[0], 0)[1]) == 0


WHOLE = {"folder": lambda text: {"c/a": text, "c/b": text}, "file": lambda text: {"c": text * 2}}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_two_processes_write_one_after_the_other(tmp_path, kind):
    one = _writes(tmp_path / "c", kind, b"one")
    assert os.read(one[1], 99) == b".\n"
    two = _writes(tmp_path / "c", kind, b"two")
    said = os.read(two[1], 999).decode()
    assert said.startswith(f"write {tmp_path}/c: waiting for pid {one[0]} on {socket.gethostname()}, started 20")
    _finish(one)
    assert os.read(two[1], 99) == b".\n"
    assert (
        _tree(tmp_path / "c" if kind == "folder" else tmp_path).items()
        >= {name.removeprefix("c/"): text for name, text in WHOLE[kind](b"one").items()}.items()
    )
    _finish(two)
    assert _tree(tmp_path) == WHOLE[kind](b"two")


def _no_locks(handle, operation):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_without_locks_the_last_of_two_processes_wins_whole(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(fcntl, "flock", _no_locks)
    one, two = (_writes(tmp_path / "c", kind, text) for text in (b"one", b"two"))
    assert [os.read(writer[1], 99) for writer in (one, two)] == [b".\n"] * 2
    for writer, text in ((two, b"two"), (one, b"one")):
        _finish(writer)
        there = {name: data for name, data in _tree(tmp_path).items() if not name.startswith(".")}
        assert there == WHOLE[kind](text)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_text_is_written_by_two_processes_under_two_names(tmp_path, monkeypatch):
    names, replace = [], Path.replace

    def interrupted(self, target):
        names.append(self.name)
        if len(names) == 1:
            write_text_atomic(tmp_path / "text", "meanwhile")
            assert (tmp_path / "text").read_text() == "meanwhile"
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    write_text_atomic(tmp_path / "text", "last")
    assert len(set(names)) == 2
    assert _tree(tmp_path) == {"text": b"last"}


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path, locked_elsewhere):
    lock = tmp_path / "new" / "x.lock"
    pid = locked_elsewhere(lock)
    owner = rf"pid {pid} on {socket.gethostname()}, started 20\d\d-[-0-9: +]+"
    with (
        pytest.raises(InputError, match=rf"^the work: {owner}, writes there\. Wait until"),
        only_writer(lock, "the work", 0),
    ):
        pass
    os.kill(pid, signal.SIGKILL)  # and leaves the file
    with only_writer(lock, "the work") as doubt:
        assert doubt == ""
        assert f"pid {os.getpid()} on" in lock.read_text()
        with pytest.raises(InputError, match=f"the work: pid {os.getpid()} on"), only_writer(lock, "the work", 0):
            pass
    assert not lock.exists()


def test_a_fork_does_not_keep_a_lock(tmp_path):
    lock = tmp_path / "x.lock"
    ready, say = os.pipe()
    wait, go = os.pipe()
    pid = os.fork()
    if not pid:
        with only_writer(lock, "test"):
            if not os.fork():  # such as a worker that loads data
                os.write(say, b".")
                os.close(go)
                os.read(wait, 1)
                os._exit(0)
            signal.pause()
    os.close(wait)
    assert os.read(ready, 1) == b"."
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with only_writer(lock, "test", 0):
        assert lock.exists()
    os.close(go)  # only now the fork ends


def test_an_exception_in_a_fork_does_not_release_the_lock(tmp_path):
    lock, parent = tmp_path / "x.lock", os.getpid()
    try:
        with only_writer(lock, "test"):
            pid = os.fork()
            if not pid:
                raise _Killed
            os.waitpid(pid, 0)
            with pytest.raises(InputError), only_writer(lock, "test", 0):
                pass
    except _Killed:
        pass
    finally:
        if os.getpid() != parent:
            os._exit(0)


@pytest.mark.parametrize(("owner", "expected"), [
    ("pid 7 on elsewhere, started 2026-01-02 03:04:05 +0000", True), ("pid 7 on {host}, started 2026-01-02", False),
])  # fmt: skip
def test_a_lock_that_another_host_has_left_is_doubted(tmp_path, owner, expected):
    """A host may be gone; or the file system keeps the locks of each host from the others."""
    lock, owner = tmp_path / "x.lock", owner.format(host=socket.gethostname())
    lock.write_text(owner)
    with only_writer(lock, "test") as doubt:
        assert doubt == (f"{lock} was left by {owner}" if expected else "")


def test_what_a_killed_process_left_is_removed_only_by_one_that_has_the_lock(tmp_path, monkeypatch):
    names = [
        ".c.0123abcd.partial",
        ".c.0123abcd.partials",
        ".cc.0123abcd.partial",
        ".c.0.partial",
        "c.0123abcd.partial",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", _no_locks)
        _make(tmp_path / "c", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "c"])
    _make(tmp_path / "c", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:], "c"])


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


@pytest.mark.parametrize(
    ("ranks", "patience", "speaks"), [("1", math.inf, True), ("2", math.inf, False), ("2", 9.0, True)]
)
def test_ranks_wait_for_shared_work_in_silence_and_for_another_run_aloud(
    tmp_path, monkeypatch, capsys, ranks, patience, speaks
):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setattr(durable, "_POLL_SECONDS", 0.0)
    answers = iter([(None, "pid 7 on host"), (os.open(os.devnull, os.O_RDONLY), "")])
    monkeypatch.setattr(durable, "_try_lock", lambda path: next(answers))
    with durable.only_writer(tmp_path / "lock", "tokenize", patience):
        pass
    assert capsys.readouterr().err == ("tokenize: waiting for pid 7 on host\n" if speaks else "")
