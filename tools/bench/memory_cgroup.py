"""A control group that limits the memory of what is started in it; of version 1 or 2, and only root may make one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """A group named ``name`` below this process's own. Raises OSError where none can be made."""

    def __init__(self, name: str, limit: int | None = None):
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
        places = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
        version_1 = next((path for controllers, path in places.items() if "memory" in controllers.split(",")), None)
        top = ROOT / "memory" if version_1 is not None else ROOT
        self._folder = top / (version_1 if version_1 is not None else places[""]).lstrip("/") / name
        self._is_1 = version_1 is not None
        self._folder.mkdir()
        if limit is not None:
            (self._folder / ("memory.limit_in_bytes" if self._is_1 else "memory.max")).write_text(str(limit))
            with suppress(OSError):  # nothing is swapped where there is no swap
                (self._folder / ("memory.swappiness" if self._is_1 else "memory.swap.max")).write_text("0")

    def start(self, command: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
        """Start ``command`` inside; its output goes to a file."""
        enter = f'echo $$ > {self._folder}/cgroup.procs && exec "$@"'
        with output.open("wb") as file:
            words = ["sh", "-c", enter, "sh", *command]
            return subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)

    @property
    def anonymous_bytes(self) -> int:
        """Memory that cannot be read again from a file: what a limit kills for."""
        wanted = "total_rss" if self._is_1 else "anon"
        lines = (self._folder / "memory.stat").read_text(encoding="ascii").splitlines()
        numbers = {name: int(value) for name, value in map(str.split, lines)}
        return numbers[wanted] + (numbers["total_shmem"] if "total_shmem" in numbers else numbers.get("shmem", 0))

    @property
    def kills(self) -> int:
        """Processes that the limit has killed."""
        text = (self._folder / ("memory.oom_control" if self._is_1 else "memory.events")).read_text(encoding="ascii")
        numbers = dict(line.split() for line in text.splitlines())
        return int(numbers["oom_kill"])

    def close(self) -> None:
        """End what still runs inside, and remove the group."""
        deadline = time.monotonic() + 30
        while True:
            for pid in (self._folder / "cgroup.procs").read_text(encoding="ascii").split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                self._folder.rmdir()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
