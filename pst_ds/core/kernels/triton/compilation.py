"""Compile each Triton kernel in one process of a host; the other ranks wait, and read Triton's cache."""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK = "pst_ds.lock"
"""Lock file in Triton's cache."""
_compiled: dict[tuple[object, ...], object] = {}
"""Kernels that this process has compiled, by id, type and options. Triton may compile one again for other alignments of
its arguments, without the lock."""


def compile_first(kernel: Any, args: Sequence[Any], options: Mapping[str, object]) -> None:
    """Compile ``kernel`` for ``args``, which start with a tensor, while no other process does; once per process.

    The launch comes later, without the lock: when a GPU loads a kernel, it may wait for a collective that was launched
    before, to which another rank would not come that waits for the lock.
    """
    key = (id(kernel), args[0].dtype, *options.values())
    if key not in _compiled:
        with _no_other_compiles():
            kernel.warmup(*args, grid=(1,), **options)
        _compiled[key] = kernel


@contextmanager
def _no_other_compiles() -> Iterator[None]:
    """Hold the lock file; nothing where there can be none. The system releases the lock of a process that ends."""
    handle = None
    with suppress(OSError, RuntimeError):  # a folder of another user, a file system without locks, no home
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def cache_folder() -> Path:
    """Return Triton's cache. Raises RuntimeError if there is no home to have it."""
    if folder := os.environ.get("TRITON_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton/cache"
