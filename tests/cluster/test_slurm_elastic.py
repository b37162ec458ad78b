"""launch/slurm_elastic.sbatch under a real Slurm whose nodes are emulated hosts, a rank on each."""

from __future__ import annotations

import pytest

from tools.chaos.elastic import ranks_of_steps
from tools.cluster.processes import RUN_FILE, result, steps, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.launcher]
JOB_SECONDS = 420
LOST_SECONDS = 180
NUM_STEPS = 400
# the names of these nodes do not resolve
WITH_ADDRESSES = """#!/bin/bash
export PET_LOCAL_ADDR=10.213.78.${SLURMD_NODENAME#n}
is_host=0
[[ $SLURMD_NODENAME == n1 ]] && is_host=1
export PET_RDZV_CONF=last_call_timeout=15,is_host=$is_host
exec "${@/#n1:/10.213.78.1:}"
"""


def test_a_job_requeues_itself_after_a_signal_and_continues_with_the_nodes_that_are_left(slurm_of_hosts, tmp_path):
    wrapper = tmp_path / "with-addresses"
    wrapper.write_text(WITH_ADDRESSES, encoding="utf-8")
    wrapper.chmod(0o755)
    folder = tmp_path / "shared" / "run"
    folder.parent.mkdir()
    log = tmp_path / "job.log"
    settings = (f"output_dir={folder}", f"train.num_steps={NUM_STEPS}", "checkpoint.interval=5", "train.log_interval=1")
    job = slurm_of_hosts.submit(
        "--nodes=3", "--time=30", f"--output={log}", "launch/slurm_elastic.sbatch", "2", RUN_FILE,
        *(word for setting in settings for word in ("--set", setting)),
        env={**slurm_of_hosts.environment(), "PST_DS_WRAP": str(wrapper)},
    )  # fmt: skip

    def ranks_now() -> int:
        return ranks_of_steps(folder)[-1][0] if steps(folder) else 0

    def said() -> str:
        return f"{slurm_of_hosts.shown(job)} {log.read_text()[-6000:]}"

    wait_until(lambda: ranks_now() == 3, JOB_SECONDS, said)
    slurm_of_hosts.call("scancel", "--signal=USR1", job)
    wait_until(lambda: slurm_of_hosts.shown(job)["Restarts"] == "1", LOST_SECONDS, said)
    saved_at = steps(folder)[-1]
    wait_until(lambda: steps(folder)[-1] > saved_at, JOB_SECONDS, said)
    slurm_of_hosts.cut_off("n3", folder.parent)
    wait_until(lambda: ranks_now() == 2, LOST_SECONDS, said)
    shown = slurm_of_hosts.wait(job, JOB_SECONDS, log)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), said()
    result(folder)
    assert steps(folder) == list(range(1, NUM_STEPS + 1))
    assert [ranks for ranks, _ in ranks_of_steps(folder)] == [3, 2]
