"""Ranks from the environment of a launcher."""

from __future__ import annotations

import os
import resource

import pytest
import torch
import torch.distributed as dist

from pst_ds.errors import InputError
from pst_ds.parallel import launch
from pst_ds.parallel.launch import FEW_RANKS, LaunchEnvironment, device_of, launch_environment
from pst_ds.parallel.ranks import all_gather_objects, barrier, of_main
from pst_ds.parallel.store import StoreGroup

from ..sockets import open_sockets

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_without_a_launcher_it_is_one_process():
    assert launch_environment({}) == LaunchEnvironment(rank=0, world_size=1, local_rank=0)
    assert launch_environment({"MASTER_ADDR": "node1", "PATH": "/bin"}) == LaunchEnvironment(0, 1, 0)


def test_the_ranks_of_deepspeed_and_torchrun():
    assert launch_environment(TORCHRUN) == LaunchEnvironment(rank=3, world_size=8, local_rank=1)
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        assert launch_environment({**TORCHRUN, name: "2"}) == LaunchEnvironment(3, 8, 1, node_size=2)
        with pytest.raises(InputError, match=f"{name}='1'.* 0 <= LOCAL_RANK < LOCAL_WORLD_SIZE"):
            launch_environment({**TORCHRUN, name: "1"})


def test_the_process_s_own_environment_is_the_default(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launch_environment() == LaunchEnvironment(0, 1, 0)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, TORCHRUN[name])
    assert launch_environment() == LaunchEnvironment(3, 8, 1)


@pytest.mark.usefixtures("alone")
def test_a_process_without_a_launcher_stays_one_after_it_has_joined():
    """A notebook whose first run was refused."""
    launch.init_distributed(launch_environment())
    try:
        assert launch_environment() == LaunchEnvironment(0, 1, 0)
    finally:
        launch.shut_down()


def test_a_triton_cache_of_another_user_is_refused(monkeypatch, tmp_path):
    folder = tmp_path / "triton"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    launch.require_own_triton_cache()
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(InputError, match=r"TRITON_CACHE_DIR = .* belongs to another user"):
        launch.require_own_triton_cache()


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


LAZY = "TORCH_GLOO_LAZY_INIT"


@pytest.mark.parametrize(
    ("world_size", "before", "after"), [(FEW_RANKS, None, None), (FEW_RANKS + 1, None, "1"), (FEW_RANKS + 1, "0", "0")]
)
def test_many_ranks_are_connected_when_they_need_to_be_unless_told_otherwise(monkeypatch, world_size, before, after):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setenv(LAZY, before or "")
    if before is None:
        monkeypatch.delenv(LAZY)
    launch._prepare_connections(world_size)
    assert os.environ.get(LAZY) == after
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (limits[1], limits[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _sockets_after_what_training_does():
    numbers, group = torch.ones(64), StoreGroup()
    dist.all_reduce(numbers)
    dist.all_gather_into_tensor(torch.empty(64 * dist.get_world_size()), numbers)
    dist.reduce_scatter_tensor(torch.empty(64 // dist.get_world_size()), numbers)
    dist.broadcast(numbers, 0)
    all_gather_objects(open_sockets())
    of_main(open_sockets)
    group.decide(0, len)
    barrier()
    return open_sockets()


@pytest.mark.zero3
def test_a_rank_connects_with_few_others(run_ranks, monkeypatch):
    """Ring and tree: two neighbours, and two for each doubling of the ranks; here ranks meet in a file."""
    monkeypatch.setenv(LAZY, "1")
    before = open_sockets()
    assert max(run_ranks(_sockets_after_what_training_does, 16)) - before <= 2 * 4 + 3


@pytest.mark.parametrize("name", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
@pytest.mark.parametrize("on_accelerator", [True, False])
def test_segments_of_gpu_memory_grow_unless_the_environment_configures_the_allocator(monkeypatch, name, on_accelerator):
    variables = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    environment = {key: value for key, value in os.environ.items() if key not in variables}
    environment["DS_ACCELERATOR"] = "cpu"
    if name:
        environment[name] = "max_split_size_mb:64"
    monkeypatch.setattr(os, "environ", dict(environment))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: on_accelerator)
    launch.use_cpu_without_accelerator()
    if on_accelerator and not name:
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    assert os.environ == environment
