"""Processes of emulated clusters: requirements, waiting, background commands, ranks and run folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent.parent
RUN_FILE = "tests/data/world_size.toml"
END_SECONDS = 20
T = TypeVar("T")


class LackError(Exception):
    """A requirement is missing on this machine."""


def require(*programs: str) -> None:
    """Check for root and these programs. Raises LackError."""
    if os.geteuid() != 0:
        raise LackError(f"this needs root, for daemons and network namespaces; the user id is {os.geteuid()}")
    missing = [name for name in programs if shutil.which(name, path=search_path()) is None]
    if missing:
        raise LackError(f"not installed: {', '.join(missing)}; .ci/run names the packages")


def search_path() -> str:
    """Return PATH with this Python's programs first, and with those for root."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a user with an activated Python environment, outside launchers and jobs."""
    of_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in of_launcher}
    python_path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    return {**kept, "PATH": search_path(), "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", **changes}


def call(*command: str, env: dict[str, str] | None = None, seconds: float = 60) -> str:
    """Return the output of a command. Raises RuntimeError if it fails."""
    done = subprocess.run(
        command, env=env or environment(), capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def wait_until(condition: Callable[[], T], seconds: float, what: Callable[[], str]) -> T:
    """Return the first true value of ``condition``. Raises TimeoutError with ``what()`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what()}")
        time.sleep(0.05)
    return value


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Background:
    """A command whose output goes to a file."""

    def __init__(self, log: Path, *command: str, env: dict[str, str] | None = None):
        self._log = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, env=env or environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT
            )

    def exit_code(self, seconds: float) -> int:
        """Wait for the end of the command. Return its exit code."""
        wait_until(lambda: self.process.poll() is not None, seconds, lambda: f"an end of it:\n{self.text()}")
        return int(self.process.returncode)

    def text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        """Stop the command if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(END_SECONDS)


@contextmanager
def ended_after(command: Background) -> Iterator[Background]:
    try:
        yield command
    finally:
        command.end()


def processes(predicate: Callable[[Path], bool]) -> list[int]:
    """Return the ids of other processes whose folder in /proc satisfies ``predicate``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() and predicate(entry):
                found.append(int(entry.name))
        except (OSError, ValueError):  # it has ended
            continue
    return found


def rank_processes(folder: Path) -> list[int]:
    """Return the ids of the ranks that train into ``folder``, by their environment and arguments."""
    word = f'output_dir="{folder}"'.encode()
    bare = f"output_dir={folder}".encode()

    def is_rank(entry: Path) -> bool:
        arguments = (entry / "cmdline").read_bytes().split(b"\0")
        return (word in arguments or bare in arguments) and "RANK" in environment_of(int(entry.name))

    return processes(is_rank)


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def steps(folder: Path) -> list[int]:
    """Return the steps in a run's metrics.jsonl, in the order of its lines."""
    path = folder / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line["step"] for line in lines if line.get("event") == "step"]


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found
