"""Ranks from the environment of a launcher."""

from __future__ import annotations

import os

import pytest
import torch

from pst_ds.errors import InputError
from pst_ds.parallel.launch import LaunchEnvironment, device_of, launch_environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_without_a_launcher_it_is_one_process():
    assert launch_environment({}) == LaunchEnvironment(rank=0, world_size=1, local_rank=0)
    assert launch_environment({"MASTER_ADDR": "node1", "PATH": "/bin"}) == LaunchEnvironment(0, 1, 0)


def test_the_ranks_of_deepspeed_and_torchrun():
    assert launch_environment(TORCHRUN) == LaunchEnvironment(rank=3, world_size=8, local_rank=1)


def test_the_process_s_own_environment_is_the_default(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launch_environment() == LaunchEnvironment(0, 1, 0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, TORCHRUN[name])
    assert launch_environment() == LaunchEnvironment(3, 8, 1)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_half_a_launch_is_refused(missing):
    environ = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(InputError) as caught:
        launch_environment(environ)
    message = str(caught.value)
    assert f"but not {missing}; start with the deepspeed launcher, torchrun or launch/local.sh" in message
    assert all(name in message for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


@pytest.mark.parametrize("value", ["", "one", "1.5"])
def test_ranks_that_are_no_numbers_are_refused_with_their_values(value):
    with pytest.raises(InputError) as caught:
        launch_environment({**TORCHRUN, "WORLD_SIZE": value})
    assert f"RANK='3', WORLD_SIZE={value!r}, LOCAL_RANK='1'" in str(caught.value)


@pytest.mark.parametrize(("rank", "world_size"), [("8", "8"), ("-1", "8"), ("0", "0")])
def test_ranks_that_cannot_be_are_refused(rank, world_size):
    with pytest.raises(InputError, match="RANK="):
        launch_environment({**TORCHRUN, "RANK": rank, "WORLD_SIZE": world_size})


def test_the_cpu_is_used_when_deepspeed_is_told_so(monkeypatch):
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    assert device_of(LaunchEnvironment(1, 2, 1)) == "cpu"


def test_a_rank_without_an_accelerator_of_its_own_is_refused(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert device_of(LaunchEnvironment(7, 8, 3)) == "cuda:3"
    with pytest.raises(InputError, match="rank 4 has LOCAL_RANK = 4, and 4 accelerators are visible"):
        device_of(LaunchEnvironment(4, 8, 4))


def test_a_slurm_task_that_sees_one_accelerator_alone_has_it(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(InputError, match="rank 3 has LOCAL_RANK = 3, and 1 accelerators are visible"):
        device_of(LaunchEnvironment(3, 8, 3))
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert device_of(LaunchEnvironment(3, 8, 3)) == "cuda:0"
