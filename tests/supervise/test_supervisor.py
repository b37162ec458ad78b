"""What follows each end of a launcher: played by a script that leaves what a run leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading

import pytest

from pst_ds.errors import InputError
from pst_ds.supervise.hosts import Hosts, read_hosts
from pst_ds.supervise.supervisor import Supervisor, exit_code_of, newest_step

# the n-th start plays the n-th line: exit code, newest step or -, exit codes of ranks or -, host of the verdict
LAUNCHER = """#!/bin/bash
echo "$*" >>"$RECORD/calls"
read -r code step ranks host < <(sed -n "$(wc -l <"$RECORD/calls")p" "$RECORD/play")
mkdir -p "$FOLDER/checkpoints" "$FOLDER/stalls"
[[ $step == - ]] || ln -sfn "step-0000$step" "$FOLDER/checkpoints/latest"
[[ -z $host ]] || echo "{\\"hosts\\": [\\"$host\\"]}" >"$FOLDER/stalls/verdict.json"
[[ ${ranks:--} == - ]] || for code_of_rank in ${ranks//,/ }; do echo $code_of_rank >"$PST_DS_EXIT_CODES/$RANDOM"; done
[[ $code == wait ]] && { trap 'exit 75' TERM; touch "$RECORD/waits"; while true; do sleep 0.05; done; }
exit "$code"
"""


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    """``supervised("1 5", "0 9", hosts=Hosts(…), words=(…))``: the exit code, the arguments of each start, what was
    said and the supervisor, of a launcher that plays these lines."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = tmp_path / "run"
    for name, value in (("RECORD", tmp_path), ("FOLDER", folder)):
        monkeypatch.setenv(name, str(value))
    script = tmp_path / "launcher"
    script.write_text(LAUNCHER, encoding="utf-8")
    script.chmod(0o755)

    def play(*lines, hosts=None, words=(), retries=10):
        (tmp_path / "play").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        said = []
        launcher = [str(script), *words]
        supervisor = Supervisor(launcher, ["run.toml", "--resume"], folder, hosts or Hosts(), retries, 0, said.append)
        code = supervisor.run()
        calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
        return code, calls, said, supervisor

    return play


def test_a_run_that_fails_and_gets_on_is_started_again_until_it_is_done(supervised, tmp_path):
    code, calls, said, supervisor = supervised("1 5", "75 7", "137 9", "0 12")
    assert code == 0
    assert calls == ["run.toml --resume"] * 4
    assert [(one.exit_code, one.from_step, one.to_step) for one in supervisor.attempts] == [
        (1, -1, 5), (75, 5, 7), (1, 7, 9), (0, 9, 12),
    ]  # fmt: skip
    assert "attempt 1 ended with 1 at step 5" in said[0]
    assert "retry 1 of 10" in said[0]
    assert "it goes on" in said[1]
    assert "retry 2 of 10" in said[2]
    lines = [json.loads(line) for line in (tmp_path / "run/launch/attempts.jsonl").read_text().splitlines()]
    assert [line["exit_code"] for line in lines] == [1, 75, 1, 0]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["1 -"], 1),  # nothing was saved
        (["1 5", "1 5"], 1),  # nothing more
        (["75 5", "75 5"], 75),
        (["2 5"], 2),
        (["1 5", "1 7", "1 9"], 1),  # the retries are used up
    ],
)
def test_a_run_that_another_start_would_not_help_ends_with_its_code(supervised, lines, expected):
    code, calls, _, _ = supervised(*lines, retries=2)
    assert (code, len(calls)) == (expected, len(lines))


@pytest.mark.parametrize("line", ["75 5", "1 5"])
def test_without_retries_it_is_started_once(supervised, line):
    code, calls, _, _ = supervised(line, "0 9", retries=0)
    assert (code, len(calls)) == (int(line.split()[0]), 1)


def test_the_codes_of_ranks_count_where_a_launcher_loses_them(supervised):
    code, calls, _, supervisor = supervised("1 5 75,75", "1 5 2")
    assert (code, len(calls)) == (2, 2)
    assert [one.exit_code for one in supervisor.attempts] == [75, 2]


@pytest.mark.parametrize(
    ("launcher", "ranks", "code"),
    [(0, [], 0), (1, [], 1), (-9, [], 1), (75, [], 75), (2, [], 2), (1, [75, 75], 75), (1, [2, 1], 2), (0, [0, 1], 1),
     (0, [75], 75), (1, [0, 0], 1), (0, [0, 0], 0), (143, [130], 1)],
)  # fmt: skip
def test_a_run_ends_as_its_ranks_say(launcher, ranks, code):
    assert exit_code_of(launcher, ranks) == code


def test_a_host_that_a_stalled_run_names_is_replaced_by_a_spare(supervised, tmp_path):
    lines = {name: f"{name} slots=8" for name in ("node1", "node2.site", "node3")}
    hosts = Hosts(lines, spares=1)
    words = ("--hostfile", "{hostfile}", "--exclude={excluded}")
    code, calls, said, supervisor = supervised("1 5 - node2", "1 5 - node1", "0 9", hosts=hosts, words=words)
    hostfile = tmp_path / "run/launch/hosts.txt"
    assert calls == [
        f"--hostfile {hostfile} run.toml --resume",
        f"--hostfile {hostfile} --exclude=node2.site run.toml --resume",
    ]
    assert code == 1  # no spare is left for the second, and nothing was saved since
    assert "without node2.site from now on: a stalled run names them" in said
    assert any("node1 should be left out" in line and "not enough spare hosts" in line for line in said)
    assert hostfile.read_text() == "node1 slots=8\nnode3 slots=8\n"
    assert [one.left_out for one in supervisor.attempts] == [[], ["node2.site"]]


def test_a_cluster_that_knows_its_hosts_is_told_which_to_leave_out(supervised):
    code, calls, _, _ = supervised("1 - - b", "0 9", hosts=Hosts(spares=2), words=("--exclude={excluded}",))
    assert (code, calls) == (0, ["run.toml --resume", "--exclude=b run.toml --resume"])


def test_a_host_that_fails_its_check_is_not_used(supervised, tmp_path):
    lines = {name: name for name in ("good", "bad", "spare")}
    hosts = Hosts(lines, spares=1, check=["test", "{host}", "!=", "bad"])
    code, _, said, _ = supervised("0 9", hosts=hosts, words=("{hostfile}",))
    assert code == 0
    assert said[0] == "without bad from now on: their check failed"
    assert (tmp_path / "run/launch/hosts.txt").read_text() == "good\nspare\n"


def test_a_signal_reaches_the_launcher_and_the_run_is_not_started_again(supervised, tmp_path):
    def stop():
        while not (tmp_path / "waits").exists():
            pass
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    stopping = threading.Thread(target=stop)
    stopping.start()
    code, calls, _, _ = supervised("wait 5", "0 9")
    stopping.join()
    assert (code, len(calls)) == (75, 1)
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(
    ("array", "job"), [({}, "41"), ({"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}, "40_3")]
)
def test_a_job_of_slurm_that_stopped_is_queued_again(supervised, tmp_path, monkeypatch, array, job):
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$*" >>"$RECORD/requeued"\n')
    (tmp_path / "scontrol").chmod(0o755)
    for name, value in {"SLURM_JOB_ID": "41", "PATH": f"{tmp_path}:{os.environ['PATH']}", **array}.items():
        monkeypatch.setenv(name, value)
    code, calls, said, _ = supervised("75 5", "0 9")
    assert (code, len(calls)) == (75, 1)
    assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"
    assert f"requeued job {job}" in said[0]


def test_a_run_without_a_checkpoint_has_no_step(tmp_path):
    assert newest_step(tmp_path) == -1
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").symlink_to("step-00000042")
    assert newest_step(tmp_path) == 42


@pytest.mark.parametrize(
    ("text", "spares", "check", "launcher", "said"),
    [
        ("a\n", 0, "", ["deepspeed"], "has no {hostfile}, and --hostfile is given"),
        (None, 0, "", ["deepspeed", "{hostfile}"], "has a {hostfile}, and --hostfile is not given"),
        (None, 1, "", ["srun"], "does not say which hosts it excludes"),
        (None, 0, "true", ["srun"], "--check asks the hosts of --hostfile"),
        ("# none\n\na\n", 1, "", ["{hostfile}"], "--spares 1 leaves none of the 1 hosts"),
    ],
)
def test_hosts_that_cannot_be_used_so_are_refused(tmp_path, text, spares, check, launcher, said):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=r"(?s).*" + said.replace("{", r"\{")):
        read_hosts("" if text is None else str(path), spares, check, launcher)


def test_a_hostfile_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_hosts(str(tmp_path / "none"), 0, "", ["{hostfile}"])


def test_two_on_one_host_are_one_too_many(supervised, tmp_path, locked_elsewhere):
    pid = locked_elsewhere(tmp_path / "run" / "launch" / f"{socket.gethostname()}.lock")
    with pytest.raises(InputError, match=rf"^pst-ds launch of {tmp_path}/run: pid {pid} on "):
        supervised("0 5")
    assert not (tmp_path / "calls").exists()
