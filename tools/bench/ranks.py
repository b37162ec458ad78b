"""Ranks that build something once and then do what they are told, all at the same time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""glibc keeps what is freed for the next step; without it every large tensor is mapped, and zeroed, anew."""


class Ranks:
    """``world_size`` fresh processes, one thread each, joined by gloo, or by the accelerator's backend.

    Each builds ``build(*args)``; :meth:`call` then calls a method of what was built on every rank. Between calls the
    processes sleep, so several of these can take turns. A context manager: the processes end with it.
    """

    def __init__(self, world_size: int, build: Callable[..., Any], *args: Any):
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        start = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **ALLOCATOR}
        os.environ.update(start)  # read by the C library and by torch when a process starts
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            told = (theirs, rank, world_size, self._folder.name, build, args)
            process = context.Process(target=_serve, args=told, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers()

    def call(self, method: str, *args: Any) -> list[Any]:
        """What ``method`` returned, by rank. Raises RuntimeError with the traceback of the first rank that failed."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # that rank has ended; its silence is the answer
                pipe.send((method, args))
        return self._answers()

    def _answers(self) -> list[Any]:
        found: dict[int, Any] = {}
        while len(found) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in found]
            for ready in wait(waiting):
                rank = next(i for i, pipe in enumerate(self._pipes) if pipe is ready)
                try:
                    ok, value = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    ok, value = False, "the process ended (out of memory?)"
                if not ok:
                    self.close()
                    raise RuntimeError(f"rank {rank}: {value}")
                found[rank] = value
        return [found[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def slowest(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest value among the ranks: they wait for each other, so the slowest is the step."""
    return {key: max(found[key] for found in by_rank) for key in by_rank[0]}


def _serve(pipe: Connection, rank: int, world_size: int, folder: str, build: Callable[..., Any], args: tuple) -> None:
    sys.stdout = sys.stderr  # libraries greet; stdout is for the result
    warnings.filterwarnings("ignore", category=FutureWarning)  # of DeepSpeed's use of torch
    try:
        built = _join_and_build(rank, world_size, folder, build, args)
        pipe.send((True, None))
        while True:
            method, told = pipe.recv()
            pipe.send((True, getattr(built, method)(*told)))
    except EOFError:
        pass  # the parent is gone
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _join_and_build(rank: int, world_size: int, folder: str, build: Callable[..., Any], args: tuple) -> Any:
    import torch
    import torch.distributed as dist

    from pst_ds.parallel.launch import LaunchEnvironment, init_distributed, use_cpu_without_accelerator

    torch.set_num_threads(1)
    use_cpu_without_accelerator()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    backend = "nccl" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "gloo"
    meet = Path(folder, "meet").as_uri()
    dist.init_process_group(backend, init_method=meet, rank=rank, world_size=world_size)
    init_distributed(LaunchEnvironment(rank, world_size, rank))
    return build(*args)
