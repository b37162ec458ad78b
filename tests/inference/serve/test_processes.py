"""Workers behind one address: one that is killed is replaced, and one that cannot start ends all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lazy_module import need_packages

need_packages("fastapi", "uvicorn", "openai")

import httpx2 as httpx  # noqa: E402

from pst_ds.errors import InputError  # noqa: E402
from pst_ds.inference.serve.processes import bound  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def _started(wrong=""):
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.inference.serve.workers", wrong]
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process, f"http://127.0.0.1:{int(process.stdout.readline())}/"
        finally:
            process.terminate()


def _ask(url, process):
    """Return which process answers, once one does."""
    while process.poll() is None:
        try:
            return httpx.get(url, timeout=60).json()
        except httpx.TransportError:
            continue
    raise AssertionError(process.stderr.read())


@pytest.mark.thorough
def test_a_killed_worker_is_replaced_until_the_server_is_told_to_end():
    with _started() as (process, url):
        seen = {_ask(url, process)}
        while len(seen) < 4:  # two at the start, and one for each that is killed
            pid = _ask(url, process)
            seen.add(pid)
            if len(seen) < 4:
                os.kill(pid, signal.SIGKILL)
        process.terminate()
        assert process.wait(60) == 0
        assert "died" in process.stderr.read()


@pytest.mark.thorough
def test_a_worker_that_cannot_start_ends_the_server_with_its_message():
    with _started("there is no such model") as (process, _):
        assert process.wait(60) == 1
        said = process.stderr.read()
        assert "pst-ds serve: there is no such model" in said
        assert "Traceback" not in said


def test_an_address_that_is_taken_is_one_message():
    with bound("127.0.0.1", 0) as at:
        at.listen()
        with pytest.raises(InputError, match="cannot listen on 127"):
            bound("127.0.0.1", at.getsockname()[1])
    with pytest.raises(InputError, match="cannot listen on nowhere"):
        bound("nowhere.invalid", 1)


def test_an_address_refuses_until_a_server_listens():
    with bound("127.0.0.1", 0) as at, pytest.raises(ConnectionRefusedError):
        socket.create_connection(at.getsockname(), timeout=30)
