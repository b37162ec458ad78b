"""launch/sweep.py: the runs of a grid, each in a folder of its own, through submitit's local executor."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tools.cluster.processes import (
    RUN_FILE,
    Background,
    call,
    ended_after,
    environment,
    environment_of,
    rank_processes,
    result,
    steps,
    wait_until,
)

pytest.importorskip("submitit")
SCRIPT = "launch/sweep.py"
RUN_SECONDS = 240


def _sweep(folder, *arguments):
    return [sys.executable, SCRIPT, str(folder), RUN_FILE, "--cluster", "local", *arguments]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--vary", "train.no_such_key", "1"], "no_such_key"),
        (["--vary", "seed"], "--vary seed has no values"),
        (["--vary", "model.path", "a/b", "a:b"], "two runs would be in"),
        (["--vary", "seed", "1", "--parameter", "no_such=1"], "no_such"),
    ],
)
def test_what_no_run_may_have_is_refused_before_any_starts(tmp_path, arguments, words):
    with ended_after(Background(tmp_path / "log", *_sweep(tmp_path / "sweep", *arguments))) as sweep:
        assert sweep.exit_code(60) == 2
        assert words in sweep.text()


@pytest.mark.launcher
@pytest.mark.thorough
def test_a_run_that_is_preempted_comes_back_and_one_that_has_ended_is_not_repeated(tmp_path):
    """Two ranks, preempted by submitit's signal to the first task. That a run which goes on ends as a whole one, to the
    bit, is tested with fewer starts (tests/train/test_resume.py)."""
    folder = tmp_path / "sweep"
    several = ("--set", "train.num_steps=60", "--set", "checkpoint.interval=0")
    varied = ("--vary", "schedule.final_sparsity", "0.75", "--parameter", "tasks_per_node=2")
    run = folder / "final_sparsity-0.75"
    env = environment(GLOO_SOCKET_IFNAME="lo")
    with ended_after(Background(tmp_path / "log", *_sweep(folder, *several, *varied), env=env)) as sweep:
        wait_until(lambda: len(steps(run)) >= 5, RUN_SECONDS, sweep.text)
        first = {environment_of(pid)["RANK"]: pid for pid in rank_processes(run)}
        os.kill(_parent(first["0"]), signal.SIGUSR2)
        assert sweep.exit_code(RUN_SECONDS) == 0, sweep.text()
    job = sweep.text().partition(":")[0]
    log = folder / "submitit" / job / f"{job}_0_log.out"
    assert f"Requeued job {job}" in log.read_text()
    assert "resuming from" in log.with_suffix(".err").read_text()
    again = call(*_sweep(folder, *several, *varied), seconds=RUN_SECONDS)
    assert again == ""
    assert (result(run)["world_size"], result(run)["sparsity_requested"]) == (2, 0.75)
    assert steps(run) == list(range(1, 61))


def _parent(pid):
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("PPid")))
