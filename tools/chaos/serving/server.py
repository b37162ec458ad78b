"""``pst-ds serve`` as a process whose workers can be observed and killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx2 as httpx

from tools.chaos.launch import ROOT, command_line, descendants
from tools.chaos.serving.clients import BODY_BYTES, KEY
from tools.cluster.processes import kill_all

_START_SECONDS, _STOP_SECONDS = 120.0, 60.0
_SAID = re.compile(r" at (http://127\.0\.0\.1:\d+/v1) ")
_STARTED = re.compile(r"Started server process \[(\d+)\]")


class ServerError(Exception):
    """The server did not start, or did not stop."""


class Server:
    """A server on a free port of 127.0.0.1, stopped at the end of its context.

    Attributes:
        url: Address of the API.
        killed: Workers that :meth:`kill_one` has killed.
        memory, files: Resident bytes and open files of each worker with a loaded model, at each look.
    """

    def __init__(self, arguments: list[str], *, workers: int, log: Path):
        self._workers, self._log = workers, log
        self.killed: set[int] = set()
        self._last_seen: list[int] = []
        self.memory: dict[int, list[int]] = {}
        self.files: dict[int, list[int]] = {}
        command = [sys.executable, "-m", "pst_ds", "serve", *arguments, "--port", "0", "--workers", str(workers)]
        command += ["--max-body", str(BODY_BYTES)]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environ = os.environ | {"PST_DS_API_KEYS": KEY, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as stream:
            self._process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=stream, stderr=stream)

    def __enter__(self) -> Server:
        try:
            self.url = self._address()
            self._wait(lambda: len(self.answering()) == self._workers and self._is_healthy(), "answer")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    @property
    def died(self) -> int:
        """Number of observed workers that ended without being killed here."""
        return len(self.memory.keys() - self.killed - set(self._last_seen))

    def workers(self) -> list[int]:
        """Return the worker processes, including those that load their model."""
        return [pid for pid in descendants(self._process.pid) if b"spawn_main" in command_line(pid)]

    def answering(self) -> list[int]:
        """Return the workers with a loaded model; a single one has it once the server prints its address."""
        if self._workers == 1:
            return [self._process.pid] if self._process.poll() is None else []
        started = {int(pid) for pid in _STARTED.findall(self._said())}
        return [pid for pid in self.workers() if pid in started]

    def look(self) -> None:
        """Record which workers answer, their memory and their open files."""
        self._last_seen = self.answering()
        for pid in self._last_seen:
            if size := _resident(pid):
                self.memory.setdefault(pid, []).append(size)
                self.files.setdefault(pid, []).append(_open_files(pid))

    def kill_one(self) -> None:
        """Kill an observed worker."""
        self.look()
        pid = self._last_seen[0]
        self.killed.add(pid)
        os.kill(pid, signal.SIGKILL)

    def wait_for_replacement(self) -> bool:
        """Wait until all workers run and the server answers. Return whether that happened."""
        with suppress(ServerError):
            self._wait(lambda: len(self.answering()) == self._workers and self._is_healthy(), "heal")
            self.look()
            return True
        return False

    def stop(self) -> int:
        """Ask the server to end, and return its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(_STOP_SECONDS)

    def _address(self) -> str:
        said: list[str] = []

        def has_said() -> bool:
            said[:] = _SAID.findall(self._said())
            return bool(said)

        self._wait(has_said, "say where it is")
        return said[0]

    def _said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _is_healthy(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(self.url.removesuffix("/v1") + "/health", timeout=5.0).status_code == 200
        return False

    def _wait(self, reached: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _START_SECONDS
        while not reached():
            if time.monotonic() > end or self._process.poll() is not None:
                raise ServerError(f"the server did not {what}: {self._said()[-2000:]}")
            time.sleep(0.1)

    def _end(self) -> None:
        """Kill all remaining processes."""
        if self._process.poll() is None:
            kill_all([self._process.pid, *descendants(self._process.pid)])
            self._process.wait()


def _open_files(pid: int) -> int:
    """Return the number of open files of a process, sockets included; 0 for one that is gone."""
    with suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def _resident(pid: int) -> int:
    """Return the resident bytes of a process; 0 for one that is gone."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
