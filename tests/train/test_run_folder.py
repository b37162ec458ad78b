"""What of an earlier run is still there while another trains in its folder."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import socket

import pytest

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.data.tasks import classification as tasks
from pst_ds.errors import InputError
from pst_ds.file_names import EXIT_CODES_VARIABLE
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.progress import Progress
from pst_ds.train import loop as training
from pst_ds.train import run_folder
from pst_ds.train.run import prepare, train_prepared


def _prepared(folder, *overrides):
    run = load_run(
        "tests/data/world_size.toml", ["deepspeed_config=", f"output_dir={json.dumps(str(folder))}", *overrides]
    )
    return prepare(run, LaunchEnvironment(0, 1, 0))


@pytest.mark.parametrize("how", ["restart", "resume"])
def test_a_run_that_trains_has_no_result_of_an_earlier_one(tmp_path, monkeypatch, how):
    """For a restart, and for a run that is resumed from before its end."""
    prepared = _prepared(tmp_path, "train.num_steps=4", "checkpoint.interval=2")
    train_prepared(prepared, quiet=True)
    if how == "resume":
        shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Loop, "steps", killed)
        with pytest.raises(KeyboardInterrupt):
            train_prepared(prepared, quiet=True, **{how: True})
    assert not (tmp_path / "result.json").exists()


def test_a_finished_run_that_is_resumed_never_lacks_its_result(tmp_path, monkeypatch):
    prepared = _prepared(tmp_path, "train.num_steps=4")
    train_prepared(prepared, quiet=True)
    monkeypatch.setattr(
        training.Loop, "steps", lambda loop, state: pytest.fail(str((tmp_path / "result.json").exists()))
    )
    with pytest.raises(pytest.fail.Exception, match="True"):
        train_prepared(prepared, quiet=True, resume=True)


def test_a_metric_that_is_no_number_is_null_in_the_files_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.Classification, "metrics", lambda self, outcomes, examples: {"accuracy": math.nan})
    train_prepared(_prepared(tmp_path, "train.num_steps=2"), quiet=True)
    result = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert result["metrics"] == {"accuracy": None}
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [line["eval/accuracy"] for line in lines if line["event"] == "evaluation"] == [None]


@pytest.mark.parametrize(
    ("precision", "multiplies", "said"), [("bf16", False, 1), ("bf16", True, 0), ("fp32", False, 0)]
)
def test_bf16_on_a_processor_without_it_is_said_once(tmp_path, monkeypatch, capsys, precision, multiplies, said):
    monkeypatch.setattr("pst_ds.train.run.multiplies_bf16", lambda: multiplies)
    train_prepared(_prepared(tmp_path, "train.num_steps=2", f"train.precision={precision}"))
    shown = "".join(capsys.readouterr())
    assert shown.count('set train.precision = "fp32"') == said


def _tree(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["new", "resume", "restart"])
def test_a_second_run_is_refused_and_writes_nothing(tmp_path, locked_elsewhere, how):
    train_prepared(_prepared(tmp_path, "train.num_steps=2"), quiet=True)
    assert not (tmp_path / "run.lock").exists()
    pid = locked_elsewhere(tmp_path / "run.lock")
    before = _tree(tmp_path)
    settings = {} if how == "new" else {how: True}
    owner = rf"pid {pid} on {socket.gethostname()}, started 20[-0-9: +]+"
    with pytest.raises(
        InputError, match=rf"^output_dir = '{tmp_path}': {owner}, writes there\. Wait until it has ended"
    ):
        train_prepared(_prepared(tmp_path, "train.num_steps=4"), quiet=True, **settings)
    assert _tree(tmp_path) == before


def test_two_runs_that_overlap_leave_the_lines_of_one(tmp_path, capsys):
    """The second goes on from a checkpoint while the first, whose job was queued again, is still at work."""
    (ready, say), (wait, go) = os.pipe(), os.pipe()
    settings = ("train.num_steps=6", "checkpoint.interval=2", "train.log_interval=1")
    pid = os.fork()
    if not pid:
        os.close(go)
        set_rates, calls = training.set_rates, iter(range(99))

        def waiting(*arguments):
            if next(calls) == 3:
                os.write(say, b".")
                os.read(wait, 1)
            set_rates(*arguments)

        training.set_rates = waiting
        try:
            train_prepared(_prepared(tmp_path / "run", *settings), quiet=True)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"."
    sets = (f"output_dir={tmp_path}/run", "deepspeed_config=", *settings)
    arguments = [word for setting in sets for word in ("--set", setting)]
    assert main(["train", "tests/data/world_size.toml", "--resume", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"pst-ds train: output_dir = '{tmp_path}/run': pid {pid} on ")
    os.write(go, b"!")
    assert os.waitpid(pid, 0)[1] == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run/result.json").exists()


def _refused(folder):
    run = load_run("tests/data/world_size.toml", [f"output_dir={json.dumps(str(folder))}"])
    with pytest.raises(InputError) as caught:
        train_prepared(prepare(run, LaunchEnvironment(rank(), world_size(), rank())), quiet=True)
    return str(caught.value)


@pytest.mark.zero3
def test_all_ranks_of_a_second_run_say_the_same(run_ranks, tmp_path, locked_elsewhere):
    pid = locked_elsewhere(tmp_path / "run.lock")
    said = run_ranks(_refused, 2, tmp_path)
    assert said[0] == said[1]
    assert f"pid {pid} on" in said[0]


def test_a_run_takes_over_from_one_that_was_killed(tmp_path, locked_elsewhere, monkeypatch):
    """At once; or, if launch/elastic.sh starts it again, after waiting for the ranks before it to end."""
    pid = locked_elsewhere(tmp_path / "run.lock")
    said = []

    def end_it(progress, text):
        said.append(text)
        os.kill(pid, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setenv(EXIT_CODES_VARIABLE, str(tmp_path / "codes"))
        patch.setattr(Progress, "say", end_it)
        train_prepared(_prepared(tmp_path, "train.num_steps=2"), quiet=True)
    assert f"waiting for pid {pid} on" in said[0]
    pid = locked_elsewhere(tmp_path / "run.lock")
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its lock is held until it has ended
    train_prepared(_prepared(tmp_path, "train.num_steps=4"), quiet=True, restart=True)


def test_without_locks_a_run_warns_once_and_goes_on(tmp_path, monkeypatch, capsys):
    flock = fcntl.flock

    def no_locks(handle, operation):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("run.lock"):  # datasets has locks too
            raise OSError(errno.ENOLCK, "No locks available")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    run_folder._warn_of_other_runs.cache_clear()
    train_prepared(_prepared(tmp_path, "train.num_steps=2"), quiet=True)
    assert capsys.readouterr().err.splitlines() == [
        f"WARNING: {tmp_path} is on a file system without file locks. Make sure that no other run writes there"
    ]
    train_prepared(_prepared(tmp_path, "train.num_steps=2"), quiet=True, restart=True)
    assert "WARNING" not in capsys.readouterr().err


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    left = [".run.toml.0123abcd.partial", ".metrics.jsonl.0123abcd.partial", ".other.0123abcd.partial"]
    for name in left:
        (tmp_path / name).write_text("half")
    train_prepared(_prepared(tmp_path, "train.num_steps=2"), quiet=True)
    assert [path.name for path in tmp_path.glob(".*")] == left[2:]  # which may be an export at work
