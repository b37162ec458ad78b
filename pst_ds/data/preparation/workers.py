"""Run numbered tasks in worker processes, which end with the process that started them."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized

from pst_ds.errors import InputError

Task = Callable[[int, Callable[[int], None]], None]
"""Does the task of a number, and reports how much of it was done since its last report."""
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2
_STOPPED = -1
"""Value of the progress counter that makes all workers stop at their next report."""
_worker: tuple[Task, Synchronized[int]]
"""Task and progress counter of this process, if it is a worker."""


def run_tasks(task: Task, numbers: Sequence[int], num_workers: int, report: Callable[[int], None]) -> None:
    """Run ``task`` for all ``numbers``, in this process, or in up to ``num_workers`` forks if more than 1.

    Raises the InputError of a task, and RuntimeError if a worker fails otherwise or is killed.
    """
    num_workers = min(num_workers, len(numbers))
    if num_workers <= 1:
        for number in numbers:
            task(number, report)
        return
    context = multiprocessing.get_context("fork")
    done: Synchronized[int] = context.Value("q", 0)
    with ProcessPoolExecutor(num_workers, context, _become_worker, (task, done)) as pool:
        reported, waiting = 0, {pool.submit(_run, number) for number in numbers}
        try:
            while waiting:
                finished, waiting = wait(waiting, _POLL_SECONDS, return_when=FIRST_EXCEPTION)
                now = done.value
                report(now - reported)
                reported = now
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker was killed. If memory ran out, use fewer --workers; the same command resumes where it stopped"
            ) from None
        except InputError:
            raise
        except Exception as error:
            raise RuntimeError(f"a worker failed: {error!r}") from error
        finally:
            done.value = _STOPPED
            pool.shutdown(cancel_futures=True)


def _become_worker(task: Task, done: Synchronized[int]) -> None:
    global _worker
    gc.freeze()  # a garbage collection would touch, and so copy, all memory shared with the first process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a worker would wait for tasks forever
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process receives it too, and stops the workers
    _worker = task, done


def _run(number: int) -> None:
    task, done = _worker

    def report(count: int) -> None:
        with done.get_lock():
            if done.value == _STOPPED:
                raise InterruptedError("another worker failed")
            done.value += count

    task(number, report)
