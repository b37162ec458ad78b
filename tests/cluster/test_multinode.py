"""launch/multinode.sh: pdsh and ssh to two hosts with addresses of their own."""

from __future__ import annotations

import os
from functools import partial

import pytest

from tests.forks import train_as_rank
from tools.cluster.processes import RUN_FILE, environment_of, rank_processes, result, steps, wait_until

from .hosts import ADDRESSES

pytestmark = [pytest.mark.cluster, pytest.mark.launcher]
RUN_SECONDS = 240
END_SECONDS = 90
FORWARDED = {"HF_TEST": "a b\"c'd$HOME`id`\\e%h;f&g", "NCCL_TEST": "%n", "PST_DS_TEST": "plain"}
OWN = "MALLOC_ARENA_MAX"  # in the launcher's own file of the environment
KEPT = {"HF_TOKEN": "secret", "UNRELATED_TEST": "here"}


def test_both_hosts_train_in_the_environment_of_the_caller(hosts, start, tmp_path):
    folder = tmp_path / "run"
    command = hosts.network.on(
        "host-a", "launch/multinode.sh", "--hostfile", hosts.hostfile, RUN_FILE, "--set", f"output_dir={folder}",
        "--set", 'data.text_columns=["text"]', "--json",
    )  # fmt: skip
    (tmp_path / "own").write_text(f"\n{OWN}=8", encoding="utf-8")
    job = start(*command, env=hosts.environment(**FORWARDED, **KEPT, DS_ENV_FILE=str(tmp_path / "own")))
    wait_until(lambda: len(steps(folder)) >= 1, RUN_SECONDS, job.text)
    seen = {host: [] for host in ADDRESSES}
    for pid in rank_processes(folder):
        (host,) = [host for host in seen if pid in hosts.network.processes(host)]
        seen[host].append(environment_of(pid))
    for found in seen.values():
        assert len(found) == 1
        assert {name: found[0].get(name) for name in FORWARDED} == FORWARDED
        assert found[0][OWN] == "8"
        assert not KEPT.keys() & found[0].keys()
    assert job.exit_code(RUN_SECONDS) == 0, job.text()
    assert result(folder)["world_size"] == 2
    assert "secret" not in job.text()


def test_a_run_that_is_stopped_and_then_loses_a_host_goes_on_each_time(hosts, start, run_ranks, tmp_path):
    folder = tmp_path / "run"
    settings = ["train.num_steps=200", "checkpoint.interval=5", "train.stall_timeout_seconds=8"]
    words = [RUN_FILE, "--resume", "--set", f"output_dir={folder}", *(w for s in settings for w in ("--set", s))]
    # ssh takes the first value of an option: these come before the script's minute
    patience = "-oServerAliveInterval=1 -oServerAliveCountMax=5 -oConnectTimeout=5"
    env = hosts.environment(PDSH_SSH_ARGS_APPEND=patience)
    command = hosts.network.on("host-a", "launch/multinode.sh", "--hostfile", hosts.hostfile, *words)

    first = start(*command, env=env)
    wait_until(lambda: len(steps(folder)) >= 10, RUN_SECONDS, first.text)
    first.process.terminate()
    assert first.exit_code(END_SECONDS) == 75, first.text()
    assert not rank_processes(folder)
    stopped_at = steps(folder)[-1]

    second = start(*command, env=env)
    wait_until(lambda: steps(folder)[-1] >= stopped_at + 20, RUN_SECONDS, second.text)
    hosts.network.cut_off("host-b")
    code = second.exit_code(END_SECONDS)
    assert code not in (0, 2, 75), second.text()
    assert "no progress for 8 seconds (train.stall_timeout_seconds)" in second.text()
    assert "rank 0 (host-a, pid " in second.text()
    wait_until(lambda: not rank_processes(folder), END_SECONDS, lambda: "an end of the ranks on the host cut off")
    reached = steps(folder)[-1]
    assert reached < 200, "the run was over before the host was cut off"

    run_ranks(partial(train_as_rank, resume=True), 1, RUN_FILE, folder, *settings)
    assert result(folder)["steps"] == 200
    assert result(folder)["world_size"] == 1
    assert os.path.islink(folder / "checkpoints" / "latest")
