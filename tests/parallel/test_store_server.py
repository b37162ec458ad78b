"""The store of many ranks is in a process of its own, which lives as long as the one that started it."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from pst_ds.errors import InputError
from pst_ds.parallel import launch
from pst_ds.parallel.launch import shut_down
from pst_ds.parallel.ranks import barrier, rank, world_size
from pst_ds.parallel.store import AGENT_STORE, StoreGroup, StoreServer

from ..sockets import open_sockets


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.thorough
def test_clients_meet_there_whatever_signal_a_job_gets_until_it_is_stopped(port):
    server = StoreServer(port)
    server.wait()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(server._process.pid, number)
    one, other = (dist.TCPStore("127.0.0.1", port, is_master=False) for _ in range(2))
    one.set("word", "heard")
    assert other.get("word") == b"heard"
    server.stop()
    assert server._process.returncode == -signal.SIGKILL


def test_a_port_that_somebody_has_is_refused(port):
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(InputError, match=rf"cannot use MASTER_PORT = {port} \(.*in use\); set another port"):
            StoreServer(port).wait()


STARTS_AND_DIES = """
import os, signal, sys
from pst_ds.parallel.store import StoreServer
server = StoreServer(int(sys.argv[1]))
server.wait()
print(server._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_the_process_that_started_it(port):
    done = subprocess.run(
        [sys.executable, "-c", STARTS_AND_DIES, str(port)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    try:
        handle = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    ended, _, _ = select.select([handle], [], [], 60)
    os.close(handle)
    assert ended


def _meet(port):
    """Sockets of this rank once all have met at a store of a process of its own."""
    own, others = rank(), world_size()
    dist.destroy_process_group()
    before = open_sockets()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if own == 0:
        launch._start_store_server()
        launch._store_server.wait()
    dist.init_process_group("gloo", rank=own, world_size=others)
    group = StoreGroup()
    decided = group.decide(own, list)
    barrier()
    found = open_sockets() - before
    barrier()
    shut_down()
    return decided, found, AGENT_STORE in os.environ


@pytest.mark.thorough
@pytest.mark.zero3
def test_rank_0_has_no_more_connections_than_the_others(run_ranks, port):
    decided, sockets, told = zip(*run_ranks(_meet, 4, port), strict=True)
    assert decided == ([0, 1, 2, 3],) * 4
    assert len(set(sockets)) == 1
    assert not any(told)
