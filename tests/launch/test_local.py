"""Signals to launch/local.sh: what the deepspeed launcher would lose reaches the ranks, and their code comes out."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tools.cluster.processes import (
    RUN_FILE,
    Background,
    ended_after,
    environment,
    free_ports,
    processes,
    rank_processes,
    steps,
    wait_until,
)

pytestmark = pytest.mark.launcher
RUN_SECONDS = 240


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Callable[..., Background]]:
    """``local(folder, ranks=2)``: a run of 80 steps, or the rest of it, in the background."""
    with ExitStack() as stack:
        logs = (tmp_path / f"output-{number}" for number in range(1000))

        def start(folder: Path, ranks: int = 2) -> Background:
            (port,) = free_ports(1)
            command = ["launch/local.sh", "--ranks", str(ranks), RUN_FILE, "--resume", "--set", f"output_dir={folder}"]
            command += ["--set", "train.num_steps=80"]
            return stack.enter_context(
                ended_after(Background(next(logs), *command, env=environment(MASTER_PORT=str(port))))
            )

        yield start


@pytest.mark.thorough
def test_term_and_usr1_save_and_exit_with_75_and_the_run_goes_on(local, tmp_path):
    folder = tmp_path / "run"
    for number, ranks in ((signal.SIGUSR1, 2), (signal.SIGTERM, 1)):  # one takes half of the time to start
        reached = len(steps(folder))
        run = local(folder, ranks)
        wait_until(lambda reached=reached: len(steps(folder)) > reached + 3, RUN_SECONDS, run.text)
        run.process.send_signal(number)
        assert run.exit_code(RUN_SECONDS) == 75, run.text()
        assert not rank_processes(folder)
        saved = (folder / "checkpoints" / "latest").resolve()
        assert saved.name == f"step-{steps(folder)[-1]:08d}"
    assert steps(folder) == list(range(1, len(steps(folder)) + 1))


@pytest.mark.thorough
def test_a_signal_before_there_is_a_rank_ends_the_launcher(local, tmp_path):
    folder = tmp_path / "run"
    run = local(folder)
    wait_until(lambda: _of_launcher(folder), RUN_SECONDS, run.text)
    run.process.terminate()
    assert run.exit_code(RUN_SECONDS) not in (0, 2, 75)
    assert not _of_launcher(folder)
    assert not folder.exists()


def _of_launcher(folder: Path) -> list[int]:
    """Processes that hold the run's folder among their arguments, apart from the script itself."""
    word = f"output_dir={folder}".encode()

    def found(entry: Path) -> bool:
        arguments = (entry / "cmdline").read_bytes().split(b"\0")
        return word in arguments and b"launch/local.sh" not in arguments

    return processes(found)
