"""A training started through the deepspeed launcher, whose ranks are known by their processes and can be killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LAUNCHER_SECONDS = 10.0
"""For the launcher to end once its ranks have been killed."""


class Launch:
    """One start of a training through the deepspeed launcher, which makes the ranks."""

    def __init__(self, arguments: list[str], num_ranks: int, log: Path):
        self._num_ranks, self.log = num_ranks, log
        self._pids: dict[int, int] = {}
        self._looked = 0.0
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(num_ranks)]
        command += ["--master_port", _free_port(), "--module", "pst_ds", "train", *arguments]
        environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        for name, first in (("PATH", Path(sys.executable).parent), ("PYTHONPATH", ROOT)):
            environ[name] = os.pathsep.join([str(first), *filter(None, [environ.get(name)])])
        environ = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **environ}
        with log.open("wb") as stream:
            self._launcher = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=stream, stderr=stream, start_new_session=True
            )

    def said(self) -> str:
        """What launcher and ranks wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_running(self) -> bool:
        return self._launcher.poll() is None

    def pids(self) -> dict[int, int]:
        """Process of each rank, once all are there; empty before."""
        if not self._pids and time.monotonic() - self._looked > 0.1:
            self._looked = time.monotonic()
            found = ranks_below(self._launcher.pid)
            self._pids = found if len(found) == self._num_ranks else {}
        return self._pids

    def kill(self, ranks: list[int]) -> bool:
        """Kill these ranks; whether any of them was alive."""
        alive = [self._pids[rank] for rank in ranks if _is_rank(self._pids[rank])]
        for pid in alive:
            _kill(pid)
        return bool(alive)

    def end(self, grace: float) -> tuple[int, int]:
        """The launcher's exit code, and how many ranks had to be killed since they did not end by themselves."""
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (self.is_running() or any(map(_is_rank, self._pids.values()))):
            time.sleep(0.05)
        return self.close()

    def close(self) -> tuple[int, int]:
        """Kill what is still there of launcher and ranks."""
        pids = {*self._pids.values(), *ranks_below(self._launcher.pid).values()}
        remaining = [pid for pid in pids if _is_rank(pid)]
        for pid in remaining:
            _kill(pid)
        try:
            code = self._launcher.wait(_LAUNCHER_SECONDS if remaining else 0.0)
        except subprocess.TimeoutExpired:
            for pid in descendants(self._launcher.pid):
                _kill(pid)
            self._launcher.kill()
            code = self._launcher.wait()
        return code, len(remaining)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def ranks_below(pid: int) -> dict[int, int]:
    """Process of each local rank that the launcher ``pid`` has started."""
    found = {}
    for child in descendants(pid):
        match = re.search(rb"--local_rank=(\d+)\0", _command_line(child))
        if match:
            found[int(match[1])] = child
    return found


def _command_line(pid: int) -> bytes:
    """Empty for a process that is gone, or ended and not yet waited for."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _is_rank(pid: int) -> bool:
    return b"--local_rank=" in _command_line(pid)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
