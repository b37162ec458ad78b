"""Ranks of ``pst-ds train`` as processes of their own, which can hang, and be sent signals."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import threading
import time

import pytest

from pst_ds.cli.main import program
from pst_ds.data.tasks.classification import Classification

RUN_FILE = "tests/data/world_size.toml"


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def _hang_at(batch):
    """Let the batch of this index never be ready."""
    collate, calls = Classification.collate, iter(range(100))

    def hanging(*arguments):
        if next(calls) == batch:
            threading.Event().wait()
        return collate(*arguments)

    Classification.collate = hanging


def _as_rank(number, port, arguments, err, hangs_at):
    os.environ.update(
        RANK=str(number), WORLD_SIZE="2", LOCAL_RANK=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )  # fmt: skip
    with err.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = sys.__stderr__
    if hangs_at is not None:
        _hang_at(hangs_at)
    sys.argv = ["pst-ds", *arguments]
    program()


@pytest.fixture
def ranks(imported_by_ranks):
    """``ranks(folder, *settings, hanging=(), at=6)``: two forks of ``pst-ds train`` that meet through a port as those
    of a launcher do, their stderr in files of ``folder``; killed at the end. Those ``hanging`` do so at a batch."""
    started = []

    def start(folder, *more, hanging=(), at=6):
        settings = [f"output_dir={json.dumps(str(folder / 'run'))}", "checkpoint.interval=1", *more]
        arguments = ["train", RUN_FILE, *(word for setting in settings for word in ("--set", setting))]
        port, fork = _free_port(), multiprocessing.get_context("fork")
        for i in range(2):
            process = fork.Process(
                target=_as_rank, args=(i, port, arguments, folder / f"{i}.err", at if i in hanging else None)
            )
            process.start()
            started.append(process)
        return started

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def exit_code():
    """``exit_code(process)``: waits for it."""

    def wait(process):
        process.join(120)
        return process.exitcode

    return wait


@pytest.fixture
def wait_for():
    """``wait_for(condition, seconds, what)``: until it holds, or fails saying ``what``."""

    def wait(condition, seconds, what):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, what
            time.sleep(0.01)

    return wait
