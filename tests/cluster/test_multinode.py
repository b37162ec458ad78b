"""The deepspeed launcher with a hostfile: pdsh and ssh to two hosts with addresses of their own."""

from __future__ import annotations

import pytest

from tools.cluster.namespaces import INTERFACE
from tools.cluster.processes import RUN_FILE, rank_processes, result, steps, wait_until

from .hosts import ADDRESSES

pytestmark = [pytest.mark.cluster, pytest.mark.launcher]
RUN_SECONDS = 240


def test_both_hosts_train(hosts, start, tmp_path):
    folder = tmp_path / "run"
    # the names of these hosts do not resolve
    (tmp_path / "forwarded").write_text(f"GLOO_SOCKET_IFNAME={INTERFACE}\nOMP_NUM_THREADS=1\n", encoding="utf-8")
    command = hosts.network.on(
        "host-a", "deepspeed", "--hostfile", hosts.hostfile, "--force_multi", "--no_ssh_check", "--master_addr",
        ADDRESSES["host-a"], "--module", "pst_ds", "train", RUN_FILE, "--set", f"output_dir={folder}",
    )  # fmt: skip
    job = start(*command, env=hosts.environment(DS_ENV_FILE=str(tmp_path / "forwarded")))
    wait_until(lambda: len(steps(folder)) >= 1, RUN_SECONDS, job.text)
    on_hosts = {host: hosts.network.processes(host) for host in ADDRESSES}
    ranks = rank_processes(folder)
    assert all(any(pid in pids for pid in ranks) for pids in on_hosts.values())
    assert job.exit_code(RUN_SECONDS) == 0, job.text()
    assert result(folder)["world_size"] == 2
