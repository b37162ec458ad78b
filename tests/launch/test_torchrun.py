"""torchrun starts ranks too: as two hosts would, each with a torchrun of its own. The end of the run is that of any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.forks import train_as_rank
from tools.cluster.processes import RUN_FILE, Background, ended_after, free_ports, rank_processes, steps, wait_until

pytestmark = pytest.mark.launcher
RUN_SECONDS = 240
STEPS = "train.num_steps=60"


@pytest.fixture
def torchruns(tmp_path: Path) -> Iterator[Callable[[Path], list[Background]]]:
    """``torchruns(folder)``: a run on two ranks: two torchruns in the background, a rank each."""
    with ExitStack() as stack:
        logs = (tmp_path / f"output-{number}" for number in range(1000))

        def start(folder: Path) -> list[Background]:
            (port,) = free_ports(1)
            meeting = [
                "--nnodes",
                "2",
                "--nproc-per-node",
                "1",
                "--master-addr",
                "127.0.0.1",
                "--master-port",
                str(port),
            ]
            run = ["-m", "pst_ds", "train", RUN_FILE, "--set", f"output_dir={folder}", "--set", STEPS]
            commands = (["torchrun", *meeting, "--node-rank", rank, *run] for rank in "01")
            return [stack.enter_context(ended_after(Background(next(logs), *command))) for command in commands]

        yield start


@pytest.mark.thorough
def test_a_run_that_is_stopped_has_saved_and_goes_on(torchruns, run_ranks, tmp_path):
    folder = tmp_path / "run"
    first, second = torchruns(folder)
    wait_until(lambda: len(steps(folder)) > 3, RUN_SECONDS, first.text)
    first.process.terminate()
    for torchrun in (first, second):
        assert torchrun.exit_code(RUN_SECONDS) == 1  # its own code, whatever that of its ranks
    wait_until(lambda: not rank_processes(folder), RUN_SECONDS, lambda: "ranks that are left")
    saved = (folder / "checkpoints" / "latest").resolve()
    assert saved.name == f"step-{steps(folder)[-1]:08d}"
    assert "stopped by SIGTERM" in first.text() + second.text()

    done, _ = run_ranks(partial(train_as_rank, resume=True), 2, RUN_FILE, folder, STEPS)
    assert (done["steps"], done["world_size"]) == (60, 2)
    assert steps(folder) == list(range(1, 61))
