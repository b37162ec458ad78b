"""Save a snapshot when a GPU runs out of memory, for https://pytorch.org/memory_viz."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from pst_ds.file_names import MEMORY
from pst_ds.parallel.ranks import rank

HISTORY_VARIABLE = "PST_DS_MEMORY_HISTORY"
"""Environment variable with the number of allocations whose stacks are recorded."""


@contextmanager
def snapshot_when_memory_ends(folder: Path, device: str) -> Iterator[None]:
    """Save a memory snapshot in the run ``folder`` if a GPU runs out of memory inside, and raise the error again."""
    if not device.startswith("cuda"):
        yield
        return
    entries = os.environ.get(HISTORY_VARIABLE, "")
    remembers = entries.isdigit() and int(entries) > 0
    if remembers:
        torch.cuda.memory._record_memory_history(max_entries=int(entries), stacks="python")
    try:
        yield
    except torch.OutOfMemoryError:
        with suppress(OSError, RuntimeError):  # the lack of memory is raised instead
            print(_saved(folder, remembers), file=sys.stderr, flush=True)
        raise
    finally:
        if remembers:
            torch.cuda.memory._record_memory_history(enabled=None)


def _saved(folder: Path, remembers: bool) -> str:
    """Save the snapshot and a summary, and return a line about them."""
    (folder / MEMORY).mkdir(parents=True, exist_ok=True)
    path = folder / MEMORY / f"rank-{rank()}.pickle"
    torch.cuda.memory._dump_snapshot(str(path))
    path.with_suffix(".txt").write_text(torch.cuda.memory_summary(), encoding="utf-8")
    stacks = "" if remembers else f"; with {HISTORY_VARIABLE}=100000 in the environment it has stacks too"
    return (
        f"rank {rank()} on {socket.gethostname()} has no memory left; what it holds is in {path}, for "
        f"https://pytorch.org/memory_viz{stacks}"
    )
