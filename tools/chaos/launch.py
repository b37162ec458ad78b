"""Start a training with the deepspeed launcher, find the processes of its ranks, and kill them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tools.cluster.processes import ROOT, environment, free_ports, kill_all

_LAUNCHER_SECONDS = 10.0
"""Seconds for the launcher to end after its ranks were killed."""


class Launch:
    """One start of a training with the deepspeed launcher."""

    def __init__(self, arguments: list[str], num_ranks: int, log: Path):
        self._num_ranks, self.log = num_ranks, log
        self._pids: dict[int, int] = {}
        self._looked = 0.0
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(num_ranks)]
        command += ["--master_port", str(free_ports(1)[0]), "--module", "pst_ds", "train", *arguments]
        environ = environment(TOKENIZERS_PARALLELISM="false")
        with log.open("wb") as stream:
            self._launcher = subprocess.Popen(
                command, cwd=ROOT, env=environ, stdout=stream, stderr=stream, start_new_session=True
            )

    def said(self) -> str:
        """Return the output of launcher and ranks."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_running(self) -> bool:
        return self._launcher.poll() is None

    def pids(self) -> dict[int, int]:
        """Return the process of each rank, once all are running; empty before."""
        if not self._pids and time.monotonic() - self._looked > 0.1:
            self._looked = time.monotonic()
            found = ranks_below(self._launcher.pid)
            self._pids = found if len(found) == self._num_ranks else {}
        return self._pids

    def kill(self, ranks: list[int]) -> bool:
        """Kill these ranks. Return whether any of them was alive."""
        alive = [self._pids[rank] for rank in ranks if _is_rank(self._pids[rank])]
        kill_all(alive)
        return bool(alive)

    def end(self, grace: float) -> tuple[int, int]:
        """Return the launcher's exit code, and the number of ranks that were killed after the grace period."""
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (self.is_running() or any(map(_is_rank, self._pids.values()))):
            time.sleep(0.05)
        return self.close()

    def close(self) -> tuple[int, int]:
        """Kill what still runs of launcher and ranks."""
        pids = {*self._pids.values(), *ranks_below(self._launcher.pid).values()}
        remaining = [pid for pid in pids if _is_rank(pid)]
        kill_all(remaining)
        try:
            code = self._launcher.wait(_LAUNCHER_SECONDS if remaining else 0.0)
        except subprocess.TimeoutExpired:
            kill_all([*descendants(self._launcher.pid), self._launcher.pid])
            code = self._launcher.wait()
        return code, len(remaining)


def descendants(pid: int) -> list[int]:
    """Return all processes below ``pid``."""
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
    """Return the process of each local rank of the launcher ``pid``."""
    found = {}
    for child in descendants(pid):
        match = re.search(rb"--local_rank=(\d+)\0", command_line(child))
        if match:
            found[int(match[1])] = child
    return found


def command_line(pid: int) -> bytes:
    """Return the command line; empty for a process that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _is_rank(pid: int) -> bool:
    return b"--local_rank=" in command_line(pid)
