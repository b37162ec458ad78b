"""launch/slurm.sbatch and launch/slurm_array.sbatch under a real Slurm of two nodes, a rank on each."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.forks import train_as_rank
from tools.cluster.processes import RUN_FILE, rank_processes, result, steps, wait_until
from tools.cluster.slurm import Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.launcher]
JOB_SECONDS = 420
# in place of pst-ds: task 900 of an array is asked to stop in its first start, 500 fails, others wait for a signal
STAND_IN = """#!/bin/bash
echo "start ${SLURM_RESTART_COUNT:-0} rank $RANK of $WORLD_SIZE on $SLURMD_NODENAME, $MASTER_ADDR:$MASTER_PORT, $*"
case ${SLURM_ARRAY_TASK_ID:-} in
  900) exit $((${SLURM_RESTART_COUNT:-0} ? 0 : 75)) ;;
  500) exit 1 ;;
esac
trap 'exit 75' TERM USR1
touch "$READY.$RANK"
while :; do sleep 0.1; done
"""


def _with_stand_in(slurm: Slurm, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pst-ds").write_text(STAND_IN, encoding="utf-8")
    (tmp_path / "bin" / "pst-ds").chmod(0o755)
    env = slurm.environment()
    return {**env, "PATH": f"{tmp_path}/bin{os.pathsep}{env['PATH']}", "READY": str(tmp_path / "ready")}


def _tensors(folder: Path) -> dict[str, bytes]:
    """The trained values and the mask bits of a finished run, by the names of its last checkpoint's files."""
    files = sorted((folder / "checkpoints" / "latest").resolve().rglob("*.safetensors"))
    assert files
    return {path.name: path.read_bytes() for path in files}


def test_before_the_time_limit_a_job_saves_requeues_itself_and_ends_as_if_never_stopped(slurm, run_ranks, tmp_path):
    """The time limit is moved to where the run is, on any machine; ranks are frozen until the signal has come."""
    folder, log = tmp_path / "job", tmp_path / "job.log"
    settings = ("train.num_steps=60", "train.log_interval=1")
    job = slurm.submit(
        "--time=30", "--signal=USR1@20", f"--output={log}", "launch/slurm.sbatch", RUN_FILE,
        *(word for setting in (*settings, f"output_dir={folder}") for word in ("--set", setting)),
    )  # fmt: skip
    wait_until(lambda: len(steps(folder)) >= 3, JOB_SECONDS, lambda: f"3 steps: {slurm.shown(job)} {log.read_text()}")
    ranks = rank_processes(folder)
    _send(ranks, signal.SIGSTOP)
    wait_until(lambda: all(map(_is_stopped, ranks)), 10, lambda: f"a stop of {ranks}")
    _limit(slurm, job, 1 + (_run_seconds(slurm, job) + 20) // 60)
    wait_until(
        lambda: all(_has_usr1(pid) or not _is_stopped(pid) for pid in ranks),
        150,
        lambda: f"USR1: {slurm.shown(job)} {log.read_text()}",
    )
    _limit(slurm, job, 30)  # for the start that ends
    _send(ranks, signal.SIGCONT)
    shown = slurm.wait(job, JOB_SECONDS, log)

    text = log.read_text()
    assert (shown["JobState"], shown["ExitCode"]) == ("COMPLETED", "0:0"), text
    assert int(shown["Restarts"]) >= 1, text
    assert len(ranks) == 2
    assert (folder / "submitted.sbatch").read_text() == Path("launch/slurm.sbatch").read_text()
    assert (folder / "run.toml").is_file()
    whole = tmp_path / "whole"
    run_ranks(train_as_rank, 2, RUN_FILE, whole, *settings)
    assert steps(folder)[-1] == steps(whole)[-1] == 60
    assert result(folder)["world_size"] == 2
    assert result(folder)["mask_checksum"] == result(whole)["mask_checksum"] != ""
    assert result(folder)["metrics"] == result(whole)["metrics"]
    assert _tensors(folder) == _tensors(whole)


def _run_seconds(slurm: Slurm, job: str) -> int:
    hours, minutes, seconds = map(int, slurm.shown(job)["RunTime"].split(":"))
    return 3600 * hours + 60 * minutes + seconds


def _limit(slurm: Slurm, job: str, minutes: int) -> None:
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_stopped(pid: int) -> bool:
    return _status(pid).get("State", "").strip().startswith("T")


def _has_usr1(pid: int) -> bool:
    """Whether USR1 waits for this stopped process. (Slurm may also send CONT with it.)"""
    return bool(int(_status(pid).get("ShdPnd", "0"), 16) >> (signal.SIGUSR1 - 1) & 1)


def _status(pid: int) -> dict[str, str]:
    """What the kernel says of a process; nothing when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return dict(line.split(":", 1) for line in lines)


def test_a_task_of_a_sweep_trains_its_sparsity_in_a_folder_of_its_own(slurm, tmp_path):
    """What an array of two hands on is seen with a stand-in, below."""
    sweep = tmp_path / "sweep"
    job = slurm.submit(
        "--array=750", "--time=10", f"--output={tmp_path}/%a.log", "launch/slurm_array.sbatch", str(sweep), RUN_FILE
    )
    shown = slurm.wait(f"{job}_750", JOB_SECONDS, tmp_path / "750.log")
    assert shown["JobState"] == "COMPLETED", (tmp_path / "750.log").read_text()
    (folder,) = sweep.iterdir()
    assert folder.name == "sparsity-0.750"
    assert (result(folder)["sparsity_requested"], result(folder)["world_size"]) == (0.75, 2)
    assert (folder / "submitted.sbatch").read_text() == Path("launch/slurm_array.sbatch").read_text()


def test_a_job_of_a_grid_that_is_preempted_saves_and_comes_back(slurm, tmp_path):
    """submitit's signal, which Slurm sends to every process of a task."""
    pytest.importorskip("submitit")
    sweep = tmp_path / "sweep"
    words = [
        sys.executable,
        "launch/sweep.py",
        str(sweep),
        RUN_FILE,
        "--vary",
        "seed",
        "1",
        "--set",
        "train.num_steps=60",
    ]
    submitted = slurm.call(*words, "--parameter", "nodes=2", "--parameter", "timeout_min=30")
    job, folder = submitted.partition(":")[0], sweep / "seed-1"
    log = sweep / "submitit" / job / f"{job}_0_log.err"
    wait_until(lambda: len(steps(folder)) >= 3, JOB_SECONDS, lambda: f"3 steps: {slurm.shown(job)}")
    slurm.call("scancel", "--signal=USR2", job)
    shown = slurm.wait(job, JOB_SECONDS, log)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert "resuming from" in log.read_text()
    assert (result(folder)["world_size"], steps(folder)) == (2, list(range(1, 61)))


# the root of another tree of mounts, and of the environment what container runtimes hand on
CONTAINER = """#!/bin/bash
mkdir -p {root}
kept=$(compgen -v | grep -E "^(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_|SLURM_|PST_DS_|OMP_|MALLOC_)" | tr "\\n" " ")
for name in $kept; do pass+=("$name=${{!name}}"); done
exec unshare --mount bash -c 'mount --rbind / {root} && exec chroot {root} env -i --chdir={top} "$@"' container \\
  "${{pass[@]}}" PATH={path} PYTHONPATH={top} IN_CONTAINER=1 "$@"
"""


def test_a_run_in_a_container_needs_nothing_on_the_batch_host(slurm, tmp_path):
    """The batch host has no pst-ds on PATH; tasks have it in a container with a root and an environment of its own."""
    top, env, folder, log = Path.cwd(), slurm.environment(), tmp_path / "job", tmp_path / "job.log"
    container = tmp_path / "container"
    container.write_text(CONTAINER.format(root=tmp_path / "root", top=top, path=env["PATH"]), encoding="utf-8")
    container.chmod(0o755)
    env |= {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "PST_DS_WRAP": str(container)}
    env |= {"PST_DS_SRUN_ARGS": "--cpu-bind=none --label", "PST_DS_SETUP": "echo set up task $RANK"}
    job = slurm.submit(
        "--time=10", f"--output={log}", "launch/slurm.sbatch", RUN_FILE, "--set", f"output_dir={folder}", env=env
    )
    shown = slurm.wait(job, JOB_SECONDS, log)
    assert shown["JobState"] == "COMPLETED", log.read_text()
    assert (result(folder)["world_size"], steps(folder)[-1]) == (2, 20)
    assert {"0: set up task 0", "1: set up task 1"} <= set(log.read_text().splitlines())
    assert (folder / "submitted.sbatch").read_text() == Path("launch/slurm.sbatch").read_text()


def test_a_task_of_an_array_requeues_itself_alone_and_a_failure_is_none_to_requeue(slurm, tmp_path):
    """Each is told its own sparsity and folder, also when it comes back."""
    job = slurm.submit(
        "--array=500,900", "--time=10", f"--output={tmp_path}/%a.log", "launch/slurm_array.sbatch",
        str(tmp_path / "sweep"), RUN_FILE, env=_with_stand_in(slurm, tmp_path),
    )  # fmt: skip
    requeued = slurm.wait(f"{job}_900", JOB_SECONDS, tmp_path / "900.log")
    failed = slurm.wait(f"{job}_500", JOB_SECONDS, tmp_path / "500.log")
    assert (failed["JobState"], failed["ExitCode"], failed["Restarts"]) == ("FAILED", "1:0", "0")
    assert (requeued["JobState"], requeued["Restarts"]) == ("COMPLETED", "1"), (tmp_path / "900.log").read_text()
    text = (tmp_path / "900.log").read_text()
    for start, rank in itertools.product((0, 1), (0, 1)):
        assert re.search(rf"start {start} rank {rank} of 2 on n{rank + 1}, 127\.0\.0\.1:[12]\d{{4}}, train", text)
    for index in (500, 900):
        started = [line for line in (tmp_path / f"{index}.log").read_text().splitlines() if line.startswith("start ")]
        of_task = f'schedule.final_sparsity=0.{index} --set output_dir="{tmp_path}/sweep/sparsity-0.{index}"'
        assert started
        assert all(of_task in line for line in started)


def test_a_cancelled_job_saves_and_is_not_requeued(slurm, tmp_path):
    log, env = tmp_path / "job.log", _with_stand_in(slurm, tmp_path)
    settings = ("--set", f"output_dir={tmp_path}/run")
    job = slurm.submit("--time=10", f"--output={log}", "launch/slurm.sbatch", RUN_FILE, *settings, env=env)
    ready = [tmp_path / f"ready.{rank}" for rank in (0, 1)]
    wait_until(
        lambda: all(path.exists() for path in ready), JOB_SECONDS, lambda: f"{slurm.shown(job)} {log.read_text()}"
    )
    slurm.call("scancel", job)
    shown = slurm.wait(job, JOB_SECONDS, log)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")
    wait_until(lambda: "task 1: Exited with exit code 75" in log.read_text(), 60, log.read_text)
