"""One writer at a time for a folder, among the processes of a host (and of all, where the file system has locks)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pst_ds.parallel.ranks import world_size
from pst_ds.progress import Progress


@contextmanager
def only_writer(path: Path, what: str) -> Iterator[None]:
    """Wait until no other process is inside for the file ``path``, which is made if need be; ``what`` names the work.

    Forks are inside with the process that made them, until the last of them has ended, whatever ends it.
    """
    handle = _locked(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _locked(path: Path, what: str) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if world_size() == 1:  # ranks of a run wait for one of them as a matter of course
                with Progress(what, 1) as progress:
                    progress.say(f"{what}: waiting for another process that does the same")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            return handle
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)  # the folder was renamed or removed by the one before
