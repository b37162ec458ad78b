"""Cache of compiled libraries: files that only this user and root can change, named by their SHA-256.

The digest is part of the name, so a library and its digest appear in one rename, and a rebuilt library never has the
name of a damaged one that this process has already loaded.
"""

import grp
import hashlib
import os
import pwd
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of compiled libraries, created if necessary. Warns about one that others can change.

    It is ``$XDG_CACHE_HOME/pst_ds``, ``~/.cache/pst_ds``, or a private temporary folder.
    """
    for folder in _candidates():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:  # a read-only home, or a file of that name
            continue
        folder = Path(os.path.realpath(folder))  # links above it may change from now on
        if why := _why_untrusted(folder):
            fix = "Change that, or set XDG_CACHE_HOME to a folder that only you can write to"
            warnings.warn(f"{folder} is not used for compiled code: {why}. {fix}", stacklevel=4)
        elif os.access(folder, os.W_OK):
            return folder
    return _last_resort()


def find_libraries(folder: Path, name: str) -> Iterator[Path]:
    """Yield the files of library ``name`` that are unchanged since this user or root wrote them."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        with suppress(OSError):
            if not _why_untrusted(path) and path.name == _file_name(name, path.read_bytes()):
                yield path


def store_library(folder: Path, name: str, data: bytes) -> Path:
    """Write library ``name`` atomically, sync it to disk and return its path. Raises OSError."""
    handle, partial = tempfile.mkstemp(prefix=f".{name}-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        path = folder / _file_name(name, data)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return path


def _file_name(name: str, data: bytes) -> str:
    return f"{name}-{hashlib.sha256(data).hexdigest()}.so"


def _candidates() -> Iterator[Path]:
    with suppress(RuntimeError):  # neither HOME nor a passwd entry
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pst_ds"
    yield Path(tempfile.gettempdir()) / f"pst_ds-{os.geteuid()}"


@cache
def _last_resort() -> Path:
    return Path(tempfile.mkdtemp(prefix="pst_ds-"))


def _why_untrusted(path: Path) -> str:
    """Return who besides this user and root could change what the real path ``path`` names, or "" for nobody."""
    for place in (path, *path.parents):
        status = place.stat()
        if status.st_uid not in _trusted_users():
            return f"user {status.st_uid} owns {place}"
        by_group = status.st_mode & stat.S_IWGRP and _has_members(status.st_gid)
        by_others = status.st_mode & stat.S_IWOTH or by_group
        # /tmp protects the entries of other users
        if by_others and (place == path or not status.st_mode & stat.S_ISVTX):
            return f"other users can write to {place}"
    return ""


def _trusted_users() -> set[int]:
    users = {0, os.geteuid()}
    with suppress(OSError):
        # in a user namespace, as in rootless containers, the overflow user represents root of the host
        if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
            users.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    return users


def _has_members(gid: int) -> bool:
    """Return whether a group may have members besides this user.

    Many systems create a group with the name of each user and no list of members.
    """
    try:
        group = grp.getgrgid(gid)
        return group.gr_name != pwd.getpwuid(os.geteuid()).pw_name or bool(set(group.gr_mem) - {group.gr_name})
    except KeyError:
        return True
