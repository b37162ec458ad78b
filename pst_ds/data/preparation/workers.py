"""Processes that share out numbered tasks. They wait on pipes alone, so that none outlives the process that began them,
whatever ends it."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from pst_ds.errors import InputError

_TASK_BYTES = 4
_MESSAGE_BYTES = 4096
"""A pipe takes so many at once or none, POSIX says 512 at the least and Linux 4096: messages do not mix."""
Task = Callable[[int, Callable[[int], None]], None]
"""Does the task of a number, and reports how much of it was done since its last report."""


def run_tasks(task: Task, numbers: Sequence[int], num_workers: int, report: Callable[[int], None]) -> None:
    """Run ``task`` for all ``numbers``, in this process or in as many forks as ``num_workers`` says if above 1.

    Raises the InputError of a task, and RuntimeError when a worker fails otherwise or is killed.
    """
    if min(num_workers, len(numbers)) <= 1:
        for number in numbers:
            task(number, report)
        return
    tasks, messages = os.pipe(), os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    workers = set()
    try:
        for _ in range(min(num_workers, len(numbers))):
            pid = os.fork()
            if not pid:
                _work(task, tasks, messages)
            workers.add(pid)
        os.close(tasks[0])
        os.close(messages[1])
        _feed(tasks[1], messages[0], numbers, report)
        _wait(workers)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(messages[0])


def _feed(tasks: int, messages: int, numbers: Sequence[int], report: Callable[[int], None]) -> None:
    """Hand out the numbers as workers take them, and pass on what they say, until the last has closed its end."""
    waiting, buffer = [number.to_bytes(_TASK_BYTES, "little") for number in reversed(numbers)], b""
    os.set_blocking(tasks, False)
    try:
        while True:
            if waiting:
                try:
                    while waiting:
                        os.write(tasks, waiting[-1])
                        waiting.pop()
                except BlockingIOError:
                    pass
                except BrokenPipeError:  # all have failed; they say why
                    waiting.clear()
                if not waiting:
                    os.close(tasks)
                    tasks = -1
            select.select([messages], [], [], 1.0)
            if not select.select([messages], [], [], 0)[0]:
                continue
            data = os.read(messages, 1 << 16)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                _heed(json.loads(line), report)
    finally:
        if tasks >= 0:
            os.close(tasks)


def _heed(message: dict[str, object], report: Callable[[int], None]) -> None:
    if "input" in message:
        raise InputError(str(message["input"]))
    if "failed" in message:
        raise RuntimeError(f"a worker failed:\n{message['failed']}")
    report(int(str(message["done"])))


def _wait(workers: set[int]) -> None:
    for pid in sorted(workers):
        _, status = os.waitpid(pid, 0)
        workers.discard(pid)
        if status:
            how = f"was killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "failed"
            raise RuntimeError(
                f"a worker {how}; if memory was short, take fewer --workers. The same command goes on where it ended"
            )


def _work(task: Task, tasks: tuple[int, int], messages: tuple[int, int]) -> NoReturn:
    """Take numbers until the pipe is empty and closed, which the death of the first process does too."""
    os.close(tasks[1])
    os.close(messages[0])
    code = 1
    try:
        gc.freeze()  # collections need not look at, and so copy, all that came with the fork
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is told as well, and ends the others
        while data := os.read(tasks[0], _TASK_BYTES):
            task(int.from_bytes(data, "little"), lambda done: _say(messages[1], done=done))
        code = 0
    except InputError as error:
        _say(messages[1], input=str(error))
    except BrokenPipeError:
        pass
    except BaseException:
        _say(messages[1], failed=traceback.format_exc()[-_MESSAGE_BYTES // 3 :])
    finally:
        os._exit(code)


def _say(messages: int, **message: object) -> None:
    data = json.dumps(message).encode() + b"\n"
    if len(data) > _MESSAGE_BYTES:
        data = json.dumps({key: str(value)[: _MESSAGE_BYTES // 8] for key, value in message.items()}).encode() + b"\n"
    os.write(messages, data)
