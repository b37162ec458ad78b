"""launch/slurm_unattended.sbatch under a real Slurm of hosts, of which one is lost: tools.chaos.slurm, for a minute."""

from __future__ import annotations

import pytest

from tools.chaos.slurm import disturbed

pytestmark = [pytest.mark.cluster, pytest.mark.launcher]


def test_a_run_whose_rank_is_killed_and_then_loses_a_host_ends_by_itself_as_if_never_disturbed(
    slurm_of_hosts, tmp_path
):
    found = disturbed(slurm_of_hosts, tmp_path, kills=1, seed=1)
    assert found.differences == []
    assert found.left_out == [found.lost]
    assert found.all_is_well, found
