"""A signal whose grace ends before the step does: the last step that is over is saved, and the run goes on from it."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train.run import prepare, train_run

RUN_FILE = "tests/data/world_size.toml"
SAVING = ("checkpoint.interval=0", "eval.interval=0", "train.log_interval=1", "train.num_steps=12")


def _train(folder, *, resume=False):
    run = load_run(RUN_FILE, [f"output_dir={json.dumps(str(folder))}", *SAVING])
    result = train_run(prepare(run, LaunchEnvironment(rank(), world_size(), rank())), resume=resume, quiet=True)
    return {**result, "seconds": 0}


def _values(folder):
    checkpoint = read_checkpoint((folder / "checkpoints/final").resolve())
    kinds, trained = ("master", "exp_avg", "exp_avg_sq"), checkpoint.contents.trained
    sizes = {name: torch.Size(shape).numel() for name, shape in trained.items()}
    found = {(kind, name): checkpoint.values(name, kind, 0, size) for kind in kinds for name, size in sizes.items()}
    return found | {("mask", name): bits for name, bits in checkpoint.masks.items()}


def _has_logged(folder, step):
    path = folder / "metrics.jsonl"
    return path.exists() and any(
        line.get("event") == "step" and line["step"] == step
        for line in map(json.loads, path.read_text().split("\n")[:-1])
    )


@pytest.mark.zero3
@pytest.mark.parametrize("hanging", [0, 1])
def test_a_step_that_does_not_end_costs_that_step_alone(ranks, exit_code, wait_for, run_ranks, tmp_path, hanging):
    processes = ranks(tmp_path, *SAVING, "checkpoint.grace_seconds=8", hanging=(hanging,))
    wait_for(lambda: _has_logged(tmp_path / "run", 6), 120, "no sixth step")
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [exit_code(process) for process in processes] == [75, 75]
    said = (tmp_path / "0.err").read_text()
    assert f"StoppedError: stopped by SIGTERM after step 6 of 12, saved in {tmp_path}/run/checkpoints/step-" in said
    folder = tmp_path / "run/checkpoints"
    assert [path.name for path in checkpoints.step_folders(folder)] == ["step-00000006"]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000006"]
    whole = run_ranks(_train, 2, tmp_path / "whole")
    assert run_ranks(lambda folder: _train(folder, resume=True), 2, tmp_path / "run") == whole
    one, other = _values(tmp_path / "whole"), _values(tmp_path / "run")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.zero3
def test_a_step_that_ends_in_time_is_saved_itself(ranks, exit_code, wait_for, tmp_path):
    processes = ranks(tmp_path, *SAVING, "checkpoint.grace_seconds=200", "train.num_steps=100000")
    wait_for(lambda: _has_logged(tmp_path / "run", 2), 120, "no second step")
    os.kill(processes[0].pid, signal.SIGUSR1)
    assert [exit_code(process) for process in processes] == [75, 75]
    saved = read_checkpoint((tmp_path / "run/checkpoints/latest").resolve()).state.step
    assert f"stopped by SIGUSR1 after step {saved} of 100000" in (tmp_path / "0.err").read_text()


@pytest.mark.zero3
def test_a_run_in_its_first_step_stops_too(ranks, exit_code, wait_for, tmp_path):
    processes = ranks(tmp_path, *SAVING, "checkpoint.grace_seconds=8", hanging=(1,), at=0)
    wait_for((tmp_path / "run/metrics.jsonl").exists, 120, "the run has not begun")
    os.kill(processes[0].pid, signal.SIGTERM)
    assert [exit_code(process) for process in processes] == [75, 75]
    assert "stopped by SIGTERM, saved in the beginning (nothing was saved yet)" in (tmp_path / "0.err").read_text()
