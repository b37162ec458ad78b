"""Programs of this package in forks of this process, which has imported torch already, in place of interpreters."""

from __future__ import annotations

import gc
import os
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from pst_ds.config.toml import load_run


def train_as_rank(run_file: str, folder: Path, *settings: str, resume: bool = False) -> dict[str, Any]:
    """Train as a rank of ``run_ranks``, and return what result.json says; as those of a launcher do, to the bit."""
    from pst_ds.parallel.launch import launch_environment
    from pst_ds.train.run import prepare, train_run

    run = load_run(run_file, [f"output_dir={folder}", *settings])
    return train_run(prepare(run, launch_environment()), resume=resume, quiet=True)


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
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


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
