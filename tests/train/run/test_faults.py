"""What goes wrong on a cluster: each ends in continued work or one clear error, and no checkpoint is lost or wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
from pathlib import Path

import pytest

from pst_ds.checkpoint import writer as checkpoint_writer
from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config.toml import load_run
from pst_ds.errors import InputError
from pst_ds.file_names import step_folders
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.parallel.store import StoreGroup
from pst_ds.train import run as run_module
from pst_ds.train.checkpointer import CheckpointWriteError
from pst_ds.train.divergence import DivergedError
from pst_ds.train.run import prepare, train_prepared

RUN_FILE = "tests/data/world_size.toml"


def _train(folder, *more, resume=False):
    settings = [f"output_dir={json.dumps(str(folder))}", "checkpoint.interval=4", "eval.interval=0", *more]
    run = load_run(RUN_FILE, settings if world_size() > 1 else ["deepspeed_config=", *settings])
    return train_prepared(prepare(run, LaunchEnvironment(rank(), world_size(), rank())), resume=resume, quiet=True)


def _events(folder, event):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def _steps_saved(folder):
    return [path.name for path in step_folders(Path(folder) / "checkpoints")]


def _poisoned(patch, bad):
    """Let the gradient be infinite in the backward passes numbered ``bad``."""
    build = run_module.build
    calls = iter(range(10**6))

    def poisoned(*arguments, **named):
        engine = build(*arguments, **named)
        param = next(p for n, p in engine.module.named_parameters() if n.endswith("pst_V"))
        param.register_hook(lambda grad: grad * (math.inf if next(calls) in bad else 1.0))
        return engine

    patch.setattr(run_module, "build", poisoned)


def test_a_loss_that_is_not_finite_leaves_the_checkpoints_and_says_where_to_go_on(tmp_path, monkeypatch):
    build = run_module.build
    calls = iter(range(10**6))

    def spoiled(*arguments, **named):
        engine = build(*arguments, **named)

        def forward(module, inputs, output):
            if module.training and next(calls) == 10:
                output.loss = output.loss * math.nan

        engine.module.register_forward_hook(forward)
        return engine

    whole = _train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "build", spoiled)
        with pytest.raises(DivergedError) as caught:
            _train(tmp_path / "run")
    assert "the loss of batch 11 is not finite on rank 0" in str(caught.value)
    newest = f"{tmp_path}/run/checkpoints/step-00000008"
    assert f"can be tried from {newest} on: set resume = true and a lower train.update" in str(caught.value)
    assert _steps_saved(tmp_path / "run") == ["step-00000008", "step-00000004"]
    assert {**_train(tmp_path / "run", resume=True), "seconds": 0} == {**whole, "seconds": 0}


@pytest.mark.thorough
def test_skipped_steps_are_remembered(tmp_path, monkeypatch):
    bad = (1, 6, 7, 12)
    with monkeypatch.context() as patch:
        _poisoned(patch, bad)
        whole = _train(tmp_path / "whole")
    assert whole["skipped_steps"] == 4
    with monkeypatch.context() as patch:
        _poisoned(patch, (*bad, *range(14, 200)))  # no step after the tenth
        patch.setattr("pst_ds.train.loop.MAX_SKIPPED_IN_A_ROW", 5)
        with pytest.raises(DivergedError, match=r"5 optimizer steps in a row .* \(after 10 applied steps\)"):
            _train(tmp_path / "run")
    assert read_checkpoint(tmp_path / "run/checkpoints/step-00000008").state.progress["batch"] == 11
    with monkeypatch.context() as patch:
        _poisoned(patch, (1,))  # batch 12 is the second from step 8 on
        resumed = _train(tmp_path / "run", resume=True)
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    losses = [[(n["step"], n["loss"]) for n in _events(tmp_path / name, "step")] for name in ("whole", "run")]
    assert losses[0] == losses[1]


def _full_disk(patch, *, after):
    """From the ``after``-th file on no shard can be written."""
    write = checkpoint_writer.write_pieces
    calls = iter(range(10**6))

    def failing(path, pieces):
        if next(calls) in after:
            path.write_bytes(next(iter(pieces)))
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, pieces)

    patch.setattr(checkpoint_writer, "write_pieces", failing)


@pytest.mark.thorough
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    whole = _train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        _full_disk(patch, after=(2, 3))
        result = _train(tmp_path / "run")
    assert {**result, "seconds": 0} == {**whole, "seconds": 0}
    said = capsys.readouterr().err
    assert "checkpoints/step-00000012 could not be written: rank 0: [Errno 28] No space left on device" in said
    assert "The run goes on; its newest checkpoint is" in said
    assert [n["step"] for n in _events(tmp_path / "run", "checkpoint_failed")] == [12, 16]
    assert [n["step"] for n in _events(tmp_path / "run", "checkpoint")] == [4, 8, 20]
    assert _steps_saved(tmp_path / "run") == ["step-00000020", "step-00000008"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


@pytest.mark.thorough
def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, capsys):
    whole = _train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        _full_disk(patch, after=(4,))
        with pytest.raises(CheckpointWriteError, match=r"step-00000020 could not be written: .* The run goes on from"):
            _train(tmp_path / "run")
    assert "WARNING" not in capsys.readouterr().err  # the error says it
    assert [n["step"] for n in _events(tmp_path / "run", "checkpoint_failed")] == [20]
    assert not (tmp_path / "run" / "result.json").exists()
    assert {**_train(tmp_path / "run", resume=True), "seconds": 0} == {**whole, "seconds": 0}


def _refused(settings_of_rank, folder):
    with pytest.raises(InputError) as caught:
        _train(folder, *settings_of_rank[rank()])
    return str(caught.value)


@pytest.mark.zero3
def test_data_that_one_rank_lacks_ends_all_ranks_with_its_name(run_ranks, tmp_path):
    missing = ((), ("data.train=tests/data/not-there.jsonl",))
    for said in run_ranks(_refused, 2, missing, tmp_path / "run"):
        assert said.startswith(f"rank 1 on {socket.gethostname()}: data.train = 'tests/data/not-there.jsonl'")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.zero3
def test_data_that_one_rank_cannot_read_ends_all_ranks_with_its_name(run_ranks, tmp_path):
    lines = Path("tests/data/validation.jsonl").read_text()
    (tmp_path / "cut.jsonl").write_text(lines[: len(lines) // 2])
    damaged = ((), (f"data.validation={tmp_path}/cut.jsonl",))
    for said in run_ranks(_refused, 2, damaged, tmp_path / "run"):
        assert said.startswith(f"rank 1 on {socket.gethostname()}: data.validation = '{tmp_path}/cut.jsonl'")


@pytest.mark.zero3
def test_ranks_that_read_other_data_are_refused(run_ranks, tmp_path):
    text = Path("tests/data/train.jsonl").read_text()
    (tmp_path / "other.jsonl").write_text(text.replace("the", "a", 1))
    other = ((), (f"data.train={tmp_path}/other.jsonl",))
    for said in run_ranks(_refused, 2, other, tmp_path / "run"):
        assert "differs between rank 0" in said


@pytest.mark.zero3
def test_a_run_folder_that_is_not_shared_is_refused(run_ranks, tmp_path):
    own = tuple((f"output_dir={json.dumps(str(tmp_path / str(i)))}",) for i in range(2))
    for said in run_ranks(_refused, 2, own, tmp_path / "run"):
        assert "is not the same folder on rank 1" in said
        assert "file system that all hosts share" in said


@pytest.mark.zero3
def test_a_rank_that_hangs_is_named_with_its_stack(ranks, exit_code, tmp_path):
    processes = ranks(tmp_path, "train.stall_timeout_seconds=4", hanging=(1,))
    assert [exit_code(process) for process in processes] == [1, 1]
    first, second = ((tmp_path / f"{i}.err").read_text() for i in range(2))
    host = socket.gethostname()
    hangs = f"rank 1 ({host}, pid {processes[1].pid}) hangs in reading a batch, and the others wait for it"
    assert f"no progress for 4 seconds (train.stall_timeout_seconds): {hangs}" in first + second
    assert (first + second).count("Continue from the newest checkpoint with --resume") == 1
    assert f"rank 0 ({host}, pid {processes[0].pid}) made no progress" in first
    assert ", in a collective" in first
    assert "in hanging" in second
    assert "not in a collective" in second
    assert read_checkpoint((tmp_path / "run/checkpoints/latest").resolve()).state.step == 6


@pytest.mark.thorough
@pytest.mark.zero3
def test_a_rank_whose_process_is_stopped_is_named(ranks, exit_code, wait_for, tmp_path):
    first, second = ranks(tmp_path, "train.stall_timeout_seconds=4", "train.num_steps=100000")
    wait_for((tmp_path / "run/checkpoints/latest").exists, 120, "no checkpoint was written")
    os.kill(second.pid, signal.SIGSTOP)
    assert exit_code(first) == 1
    said = (tmp_path / "0.err").read_text()
    assert f"no report of rank 1 ({socket.gethostname()}): stopped, cut off or late, or its host is down" in said
    assert step_folders(tmp_path / "run/checkpoints")


@pytest.mark.few(1)
@pytest.mark.zero3
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(ranks, exit_code, wait_for, tmp_path, number):
    processes = ranks(tmp_path, "train.num_steps=100000")
    wait_for((tmp_path / "run/checkpoints/latest").exists, 120, "no checkpoint was written")
    os.kill(processes[1].pid, number)
    assert [exit_code(process) for process in processes] == [75, 75]
    saved = read_checkpoint((tmp_path / "run/checkpoints/latest").resolve())
    (line,) = [n for n in (tmp_path / "0.err").read_text().splitlines() if "stopped by" in n]
    assert f"stopped by {number.name} after step {saved.state.step} of 100000, saved in" in line
    assert "stopped by" not in (tmp_path / "1.err").read_text()


@pytest.mark.thorough
def test_a_checkpoint_that_is_there_is_not_said_to_have_failed(tmp_path, monkeypatch, capsys):
    """Another rank that is killed right after rank 0 gave the last checkpoint its name."""

    def cut_off(group, report, decision):
        decision([report])
        raise RuntimeError("Connection closed by peer")

    with monkeypatch.context() as patch:
        patch.setattr(StoreGroup, "decide", cut_off)
        assert _train(tmp_path / "run")["steps"] == 20
    assert "could not be written" not in capsys.readouterr().err
    assert [n["step"] for n in _events(tmp_path / "run", "checkpoint")] == [4, 8, 12, 16, 20]
    assert _events(tmp_path / "run", "checkpoint_failed") == []
