"""Programs of this package in forks of this process, which has imported torch already, in place of interpreters."""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from pst_ds.config.toml import load_run
from tools.cluster.processes import free_ports


def train_as_rank(run_file: str, folder: Path, *settings: str, resume: bool = False) -> dict[str, Any]:
    """Train as a rank of ``run_ranks``, and return what result.json says; as those of a launcher do, to the bit."""
    from pst_ds.parallel.launch import launch_environment
    from pst_ds.train.run import prepare, train_prepared

    run = load_run(run_file, [f"output_dir={folder}", *settings])
    return train_prepared(prepare(run, launch_environment()), resume=resume, quiet=True)


class ForkedModule:
    """What callers of ``subprocess.Popen([sys.executable, "-m", module, *arguments])`` use of it.

    For tests of what a program does, and not of how it starts. What it reads of its own command line in /proc is ours.
    """

    def __init__(
        self, command: Sequence[str], *, stdout: IO[bytes], stderr: IO[bytes], env: Mapping[str, str], **_: Any
    ):
        interpreter, option, module, *arguments = command
        assert (interpreter, option) == (sys.executable, "-m")
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run(module, arguments, stdout.fileno(), stderr.fileno(), env)

    def wait(self) -> int:
        return self._look(0) or 0

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def _look(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


class ForkedLaunch:
    """What the soak uses of ``tools.chaos.launch.Launch``: ranks that are forks, and end when one of them fails."""

    def __init__(self, arguments: Sequence[str], num_ranks: int, log: Path):
        self.log, self._is_ending = log, False
        of_all = {**os.environ, "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
        of_all["MASTER_PORT"] = str(free_ports(1)[0])
        command = [sys.executable, "-m", "pst_ds", "train", *arguments]
        with log.open("wb") as out:
            self._ranks = [
                ForkedModule(command, stdout=out, stderr=out, env={**of_all, "RANK": str(i), "LOCAL_RANK": str(i)})
                for i in range(num_ranks)
            ]

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_running(self) -> bool:
        codes = [rank.poll() for rank in self._ranks]
        if any(codes) and not self._is_ending:
            self._is_ending = True
            self._send(signal.SIGTERM)
        return None in codes

    def pids(self) -> dict[int, int]:
        return {i: rank.pid for i, rank in enumerate(self._ranks)}

    def kill(self, ranks: list[int]) -> bool:
        alive = [self._ranks[rank] for rank in ranks if self._ranks[rank].poll() is None]
        for rank in alive:
            os.kill(rank.pid, signal.SIGKILL)
        return bool(alive)

    def end(self, grace: float) -> tuple[int, int]:
        deadline = time.monotonic() + grace
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.close()

    def close(self) -> tuple[int, int]:
        remaining = self._send(signal.SIGKILL)
        codes = [rank.wait() for rank in self._ranks]
        return next(filter(None, codes), 0), remaining

    def _send(self, number: int) -> int:
        """To those that run; how many these are."""
        running = [rank for rank in self._ranks if rank.poll() is None]
        for rank in running:
            os.kill(rank.pid, number)
        return len(running)


def _run(module: str, arguments: list[str], stdout: int, stderr: int, env: Mapping[str, str]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        gc.freeze()  # collections need not look at, and so copy, all that came with the fork
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        os.environ.clear()
        os.environ.update(env)
        code = _exit_code(module, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(module: str, arguments: list[str]) -> int:
    import torch

    torch.set_num_threads(1)  # makes torch's pool anew, which a fork has not
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
