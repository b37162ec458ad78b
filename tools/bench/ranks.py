"""Processes of benchmarks: workers that take turns, and ranks that work at the same time."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""Makes glibc keep freed memory for the next step; otherwise every large tensor is mapped, and zeroed, again."""
REST_SECONDS = 0.03
"""Pause between two turns: threads of OpenMP spin for some milliseconds before they sleep."""


class Worker:
    """A process that opens something once and then runs functions on it. Construction does not wait for it."""

    def __init__(self, name: str, context: Any, opener: Callable[[], Any]):
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, opener), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Start ``work(opened, *arguments)`` in the process."""
        with suppress(BrokenPipeError):  # the process has ended, which result() reports
            self.connection.send((work, arguments))

    def result(self) -> Any:
        """Return what the process answers next. Raises RuntimeError with its traceback."""
        try:
            failed, result = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            code = self.process.exitcode
            raise RuntimeError(f"{self.name}: the process ended with exit code {code}") from None
        if failed:
            raise RuntimeError(f"{self.name}: {result}")
        return result

    def ask(self, work: Callable[..., Any], *arguments: Any) -> Any:
        self.send(work, *arguments)
        return self.result()

    def close(self) -> None:
        self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
        self.connection.close()


@contextmanager
def working(
    openers: Mapping[str, Callable[[], Any]], threads: int, preload: Sequence[str] = (), method: str = "forkserver"
) -> Iterator[dict[str, Worker]]:
    """Start a worker for each opener, one after another, and end them in any case.

    Args:
        threads: OMP_NUM_THREADS of the processes.
        preload: Modules imported once, before processes are forked.
    """
    context: Any = multiprocessing.get_context(method)
    context.set_forkserver_preload(list(preload))
    workers: dict[str, Worker] = {}
    try:
        with _environment(OMP_NUM_THREADS=str(threads)):
            for name, opener in openers.items():
                workers[name] = Worker(name, context, opener)
                workers[name].result()
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def medians_in_turn(
    workers: Mapping[str, Worker], work: Callable[..., float], *arguments: Any, repeats: int, rest: float = REST_SECONDS
) -> dict[str, float]:
    """Return the median of ``work`` for each worker over ``repeats`` rounds, after a warm-up round."""
    found: dict[str, list[float]] = {name: [] for name in workers}
    for counted in range(repeats + 1):
        for name, worker in workers.items():
            value = worker.ask(work, *arguments)
            if counted:
                found[name].append(value)
            time.sleep(rest)
    return {name: statistics.median(values) for name, values in found.items()}


class Ranks:
    """``world_size`` processes with one thread each, joined by gloo, or by the accelerator's backend.

    Each builds ``build(*args)``; :meth:`call` calls a method of it on every rank. Between calls the processes sleep, so
    several of these can take turns. A context manager that ends the processes.
    """

    def __init__(self, world_size: int, build: Callable[..., Any], *args: Any):
        self._folder = tempfile.TemporaryDirectory()
        context, meet = multiprocessing.get_context("spawn"), Path(self._folder.name, "meet").as_uri()
        with _environment(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", **ALLOCATOR):
            self.workers = [
                Worker(f"rank {rank}", context, partial(_join_and_build, rank, world_size, meet, build, args))
                for rank in range(world_size)
            ]
        self._results()

    def call(self, method: str, *args: Any) -> list[Any]:
        """Return what ``method`` returned, by rank. Raises RuntimeError with the traceback of the first failed rank."""
        for worker in self.workers:
            worker.send(_call_method, method, *args)
        return self._results()

    def _results(self) -> list[Any]:
        waiting = {worker.connection: rank for rank, worker in enumerate(self.workers)}
        found: dict[int, Any] = {}
        try:
            while waiting:  # in the order of answers: a rank that fails leaves the others in a collective
                for ready in wait(list(waiting)):
                    rank = waiting.pop(ready)
                    found[rank] = self.workers[rank].result()
        except RuntimeError:
            self.close()
            raise
        return [found[rank] for rank in sorted(found)]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self._folder.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def slowest(by_rank: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the largest value over the ranks: they wait for each other, so the slowest determines the step."""
    return {key: max(found[key] for found in by_rank) for key in by_rank[0]}


def _serve(connection: Connection, opener: Callable[[], Any]) -> None:
    try:
        opened = opener()
    except BaseException:
        connection.send((True, traceback.format_exc()))
        return
    connection.send((False, None))
    while True:
        try:
            work, arguments = connection.recv()
        except EOFError:  # the parent has ended
            return
        try:
            connection.send((False, work(opened, *arguments)))
        except Exception:
            connection.send((True, traceback.format_exc()))


def _call_method(built: Any, method: str, *args: Any) -> Any:
    return getattr(built, method)(*args)


def _join_and_build(rank: int, world_size: int, meet: str, build: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    import torch
    import torch.distributed as dist

    from pst_ds.parallel.launch import LaunchEnvironment, init_distributed, use_cpu_without_accelerator

    sys.stdout = sys.stderr  # libraries print greetings; stdout is for the result
    warnings.filterwarnings("ignore", category=FutureWarning)  # of DeepSpeed's use of torch
    torch.set_num_threads(1)
    use_cpu_without_accelerator()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    backend = "nccl" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "gloo"
    dist.init_process_group(backend, init_method=meet, rank=rank, world_size=world_size)
    init_distributed(LaunchEnvironment(rank, world_size, rank))
    return build(*args)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables, which the C library and torch read when a process starts, within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
