"""Files and folders that are whole on disk or not there at all, whatever kills the process that writes them."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pst_ds.errors import InputError

PARTIAL, OLD = ".partial", ".old"
"""Endings of a folder that is being written, and of one that is being replaced."""


def require_writable(path: Path, what: str) -> None:
    """Raise InputError when ``path``, which need not be there yet, cannot be made; ``what`` names it: "--out a/b"."""
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
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_new(path: Path, data: bytes) -> str:
    """:func:`write_pieces` of one."""
    return write_pieces(path, (data,))


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a file of ``pieces``, one behind the other, wait for the disk, read it back from there; its SHA-256.

    Memory holds one piece at a time, as far as the caller makes them one by one. Raises OSError when the disk is full,
    or gives back other bytes than it was given.
    """
    taken = hashlib.sha256()
    with path.open("wb") as stream:
        for piece in pieces:
            taken.update(piece)
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())
        if hasattr(os, "posix_fadvise"):  # or the page cache would answer for the disk
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if file_sha256(path) != (digest := taken.hexdigest()):
        raise OSError(f"{path} was read back with other bytes than were written; the disk is failing")
    return digest


def write_text_atomic(path: Path, text: str) -> None:
    """:func:`write_bytes_atomic` of a text."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Give ``path`` a new content; a reader, also after a crash, finds the old one or the new one.

    A link stays one: the file that it names is replaced. A device or a pipe is written to. Raises IsADirectoryError.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}{PARTIAL}")
    try:
        write_new(beside, data)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_link(path: Path, target: str) -> None:
    """Make ``path`` a symbolic link to ``target`` beside it, in one step."""
    beside = path.with_name(f".{path.name}{PARTIAL}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(path)
    sync(path.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name ``folder`` at the end; after an error nothing of it is left.

    A link stays one: the folder that it names is replaced.
    """
    folder = Path(os.path.realpath(folder))
    restore_replaced(folder)
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        publish(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, folder: Path) -> None:
    """Give a finished folder, its files on disk, its name; what had the name before is gone then."""
    sync(partial)
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
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
    """After a crash between the two renames of :func:`publish`: give the older folder its name back."""
    old = folder.with_name(folder.name + OLD)
    if old.is_dir():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)
