"""Atomic writes of files and folders, which a crash cannot leave incomplete, and locks against concurrent writers."""

import errno
import fcntl
import hashlib
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from pst_ds.errors import InputError
from pst_ds.progress import Progress

PARTIAL = ".partial"
"""Ending of a file or folder that is being written."""
OLD = ".old"
"""Ending of a folder that is being replaced."""
LOCK = ".lock"
_POLL_SECONDS = 0.2
_held_locks: set[int] = set()
"""Descriptors of the locks that this process holds."""


def require_writable(path: Path, what: str) -> None:
    """Raise InputError if ``path``, which need not exist, cannot be written; ``what`` names it: "--out a/b"."""
    # What is missing will be made, so the nearest folder that exists decides.
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if place != path.absolute() and not place.is_dir():
        raise InputError(f"{what} cannot be written: {place} is a file, and no folder; name a place elsewhere")
    if not os.access(place, os.W_OK):
        raise InputError(f"{what} cannot be written: no permission to write in {place}; name a place elsewhere")


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_new(path: Path, data: bytes) -> str:
    """Write a file, as :func:`write_pieces`."""
    return write_pieces(path, (data,))


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a file of consecutive ``pieces``, wait for the disk, read it back, and return its SHA-256.

    Raises OSError if the disk is full, or returns different bytes.
    """
    written = hashlib.sha256()
    with path.open("wb") as stream:
        for piece in pieces:
            written.update(piece)
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):
            # Otherwise the page cache would answer for the disk.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    digest = written.hexdigest()
    if file_sha256(path) != digest:
        raise OSError(f"{path} was read back with other bytes than were written; the disk is failing")
    return digest


def write_text_atomic(path: Path, text: str) -> None:
    """Replace the content of ``path`` atomically, as :func:`write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace the content of ``path`` atomically: after a crash it has the old content or the new one.

    A link stays one: the file that it names is replaced. A device or a pipe is written to. Raises IsADirectoryError.
    """
    # Renaming a file to a folder fails too, but with the name of the partial file.
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    with _replacing(Path(os.path.realpath(path))) as partial:
        write_new(partial, data)


def replace_link(path: Path, target: str) -> None:
    """Make ``path`` a symbolic link to ``target`` in the same folder, atomically."""
    with _replacing(path) as partial:
        partial.symlink_to(target)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a name for a new file, which then replaces ``path``; remove it after an error."""
    partial = partial_name(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)  # a rename is on disk once the folder is


def partial_name(path: Path) -> Path:
    """Return a name next to ``path`` for what is being written, which no other process uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")


def remove_partial(*paths: Path) -> None:
    """Remove partial files of killed processes for ``paths`` in one folder. No process may be writing them."""
    names = "|".join(re.escape(path.name) for path in paths)
    unfinished = re.compile(rf"\.({names})\.[0-9a-f]{{8}}{re.escape(PARTIAL)}")
    # The folder is listed before anything is removed from it.
    for path in list(paths[0].parent.iterdir()):
        if unfinished.fullmatch(path.name):
            _remove(path)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to ``folder`` at the end, or removed after an error.

    A link stays one: the folder that it names is replaced. Other processes that write the same folder wait.
    """
    folder = Path(os.path.realpath(folder))
    with _written_alone(folder) as partial:
        # Before writing: an interrupted predecessor must not count as an older version that `publish` can remove.
        restore_replaced(folder)
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        publish(partial, folder)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a name to write a file under, as :func:`atomic_folder`."""
    path = Path(os.path.realpath(path))
    with _written_alone(path) as partial:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)


@contextmanager
def _written_alone(path: Path) -> Iterator[Path]:
    """Yield the partial name of ``path`` when no other process has one; remove it after an error."""
    with only_writer(path.with_name(f".{path.name}{PARTIAL}{LOCK}"), f"write {path}") as doubt:
        if not doubt:  # with a doubt, another process may be writing one of them
            remove_partial(path)
        partial = partial_name(path)
        try:
            yield partial
        except BaseException:
            _remove(partial)
            raise


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its content, as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def publish(partial: Path, folder: Path) -> None:
    """Rename a finished folder, whose files are on disk, to ``folder``, and remove its predecessor."""
    sync(partial)
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
        # A rename cannot replace a folder that is not empty. A crash between the two renames leaves the name unused;
        # `restore_replaced` repairs that.
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Restore the older folder after a crash between the two renames of :func:`publish`."""
    old = folder.with_name(folder.name + OLD)
    if old.is_dir():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)


@contextmanager
def only_writer(path: Path, what: str, patience: float = math.inf) -> Iterator[str]:
    """Hold the lock file ``path`` while doing ``what``. Yield why another process may still be writing, or "".

    There may be one on a file system without locks. The kernel releases the lock when the process ends. Raises
    InputError that names the owner after ``patience`` seconds.
    """
    # flock and not a POSIX record lock: that would be lost as soon as anything in this process, such as a copy of the
    # folder, opened and closed the file. NFS shows flock to all hosts too.
    # Ranks of a run share work by waiting for each other, which needs no message.
    is_unusual = patience < math.inf or os.environ.get("WORLD_SIZE", "1") == "1"
    with ExitStack() as stack:
        deadline = time.monotonic() + patience
        waiting: Progress | None = None
        while True:
            handle, text = _try_lock(path)
            if handle is not None:
                break
            owner = text or "another process"  # which has the lock, but has not written its name yet
            if time.monotonic() >= deadline:
                raise InputError(f"{what}: {owner}, writes there. Wait until it has ended, or name another folder")
            if waiting is None:
                waiting = stack.enter_context(Progress(what, 1))
                if is_unusual:
                    waiting.say(f"{what}: waiting for {owner}")
            waiting.at(0)  # a sign of life for the watch for stalls
            time.sleep(_POLL_SECONDS)
    _held_locks.add(handle)
    try:
        yield text
    finally:
        if handle in _held_locks:  # a fork that leaves this context does not hold the lock
            # Removed before it is released: a process that locks it in between finds that it is not current.
            path.unlink(missing_ok=True)
            _held_locks.remove(handle)
            os.close(handle)


def _try_lock(path: Path) -> tuple[int | None, str]:
    """Return a descriptor of the locked file and what :func:`only_writer` yields, or None and the owner."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        doubt = ""
        owner = os.pread(handle, 200, 0).decode(errors="replace")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None, owner
        except OSError:
            doubt = f"{path.parent} is on a file system without file locks"
        host = f"on {socket.gethostname()},"
        # The lock was granted, so an owner in the file was killed, or is on another host and the file system does not
        # show its lock here.
        if owner and (doubt or host not in owner):
            left = f"{path} was left by {owner}"
            doubt = f"{doubt} and {left}" if doubt else left
        if _is_current(path, handle):
            os.ftruncate(handle, 0)
            started = datetime.now().astimezone()
            os.pwrite(handle, f"pid {os.getpid()} {host} started {started:%Y-%m-%d %H:%M:%S %z}".encode(), 0)
            return handle, doubt
        # The previous owner has removed the file, or the folder, between the opening and the lock.
        os.close(handle)


def _is_current(path: Path, handle: int) -> bool:
    """Return whether ``path`` names the file that ``handle`` has open."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _close_copies() -> None:
    """Close a fork's copies of the locks, which would outlive the process that holds them."""
    for handle in _held_locks:
        os.close(handle)  # does not release the lock, which belongs to the open file that both have
    _held_locks.clear()


os.register_at_fork(after_in_child=_close_copies)
