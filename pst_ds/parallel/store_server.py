"""The store at which many ranks meet, in a process of its own.

A store has a connection to every rank, and one more to each that has a :class:`pst_ds.parallel.store_group.StoreGroup`.
Where it is part of rank 0, as c10d has it, that rank's connections grow with the ranks; torchrun keeps it in its agent,
and so does this for all other launchers. It is run as a program of its own, since a fork of a process that has threads
can hang.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from pst_ds.errors import InputError

AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Variable that tells c10d, with "True", that the store is there and rank 0 is not to make it."""
_READY = "ready"
_PR_SET_PDEATHSIG = 1
_SIGNALS_OF_JOBS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What launchers send to every process of a job: a rank may still have to save then, and needs the store for it."""


class StoreServer:
    """The process that holds the store at ``port`` of this host. It ends with the thread that made this, whatever ends
    that, or by :meth:`stop`."""

    def __init__(self, port: int):
        self._port = port
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "pst_ds.parallel.store_server", str(port), str(os.getpid())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )

    def wait(self) -> None:
        """Return once ranks can meet there. Raises InputError where nobody can."""
        assert self._process.stdout is not None
        with self._process.stdout as said:
            answer = said.readline().strip()
        if answer != _READY:
            self.stop()
            why = answer or "it ended at once"
            raise InputError(
                f"the store at which ranks meet cannot use MASTER_PORT = {self._port} ({why}); set another port, one "
                "for each run on this host"
            )

    def stop(self) -> None:
        """End the process: no rank has a store then."""
        self._process.kill()
        self._process.wait()


def serve(port: int, parent: int) -> None:
    """Hold a store at ``port`` until the process ``parent``, which started this one, is no more; does not return."""
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
