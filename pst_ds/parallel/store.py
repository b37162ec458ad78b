"""The store at which ranks meet: a process that holds it, and exchanges over it. Importing this needs no torch.

A store has a connection to every rank, and one more to each :class:`StoreGroup`. c10d puts it into rank 0, whose
connections then grow with the ranks; torchrun keeps it in its agent, and :class:`StoreServer` does the same for other
launchers. The server is a separate program, since forking a process that has threads can hang.
"""

import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pst_ds.errors import InputError

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Environment variable that tells c10d, with "True", that the store exists and rank 0 must not create it."""
_READY = "ready"
_PR_SET_PDEATHSIG = 1
_SIGNALS_OF_JOBS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that launchers send to every process of a job: ranks still need the store to save then."""
_group_numbers = itertools.count()


def store_connection() -> "dist.Store | None":
    """Return this thread's connection to the store, since a waiting one blocks others; None for a single rank."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


class StoreGroup:
    """Exchange small JSON values between all ranks, from threads that run while training uses the process group.

    Every rank has one connection to the store and none to other ranks, and needs no collective to open it. All ranks
    create their groups in the same order, and call the methods of one in the same order, in any thread.

    ``patience_seconds``: how long a rank waits for another; None is the process group's timeout.
    """

    def __init__(self, patience_seconds: float | None = None) -> None:
        from pst_ds.parallel.ranks import rank, world_size

        self._rank = rank()
        self._world = world_size()
        self._store = store_connection()
        if self._store is not None and patience_seconds is not None:
            self._store.set_timeout(timedelta(seconds=patience_seconds))
        self._name = f"pst_ds/{next(_group_numbers)}"
        self._round = 0

    def decide(self, value: T, decision: Callable[[Sequence[T]], R]) -> R:
        """Return on every rank the ``decision`` of rank 0 on the values of all ranks, in order. Collective.

        Only rank 0 calls ``decision``, which must not raise. Values and decision travel as JSON, so a tuple becomes a
        list: unpickling would let anyone who reaches the store run code on every rank. Rank 0, which may hold the
        store, returns once all others have the answer.

        Raises:
            torch.distributed.DistError: a rank is missing after the group's patience.
            ValueError: data in the store that no rank has sent.
        """
        own = json.dumps(value)
        if self._store is None:
            return json.loads(json.dumps(decision([json.loads(own)])))
        name = f"{self._name}/{self._round}"
        self._round += 1
        if self._rank:
            self._store.set(f"{name}/of-{self._rank}", own)
            decided = json.loads(self._store.get(f"{name}/answer"))
            with suppress(RuntimeError):  # rank 0 has ended; the answer is here
                self._store.set(f"{name}/read-{self._rank}", "")
            return decided
        others = range(1, self._world)
        sent = [own, *(self._store.get(f"{name}/of-{other}").decode() for other in others)]
        answer = json.dumps(decision([json.loads(text) for text in sent]))
        self._store.set(f"{name}/answer", answer)
        self._store.wait([f"{name}/read-{other}" for other in others])
        # every rank has read the answer, so nothing of this round is needed any more
        self._store.delete_key(f"{name}/answer")
        for other in others:
            self._store.delete_key(f"{name}/of-{other}")
            self._store.delete_key(f"{name}/read-{other}")
        return json.loads(answer)


class StoreServer:
    """A process that holds the store at ``port`` of this host, until :meth:`stop` or the end of the calling thread."""

    def __init__(self, port: int):
        self._port = port
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pst_ds.parallel.store", str(port), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def wait(self) -> None:
        """Return once ranks can meet there. Raises InputError if the port cannot be used."""
        assert self._process.stdout is not None
        with self._process.stdout as output:
            answer = output.readline().strip()
        if answer != _READY:
            self.stop()
            raise InputError(
                f"the store at which ranks meet cannot use MASTER_PORT = {self._port} "
                f"({answer or 'it ended at once'}); set another port, one for each run on this host"
            )

    def stop(self) -> None:
        """End the process, and with it the store."""
        self._process.kill()
        self._process.wait()


def serve(port: int, parent: int) -> None:
    """Hold a store at ``port`` until the process ``parent``, which started this one, ends; does not return."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for number in _SIGNALS_OF_JOBS:
        signal.signal(number, signal.SIG_IGN)
    from torch.distributed import TCPStore

    try:
        store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        print(" ".join(str(error).split()), flush=True)
        return
    print(_READY, flush=True)
    while store is not None:
        signal.pause()


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
