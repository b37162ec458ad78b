"""Notice a lost host: every rank leaves signs of life in the store and watches those of the next rank.

Collectives do not notice a host whose link is cut, since nothing resets their connections. The ranks that wait for it
end here instead, with the exit code that asks for another start. Importing this needs no torch.
"""

import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

from pst_ds.parallel.stop_signals import EXIT_STOPPED, record_exit_code
from pst_ds.parallel.store import AGENT_STORE

PERIOD_SECONDS = 2.0
"""Seconds between two signs of a rank."""
LOST_SECONDS = 60.0
"""Seconds without a sign of the next rank, or without an answer of the store, after which a host is lost."""
START_SECONDS = 300.0
"""Seconds until the ranks have met, or the next rank has given its first sign: its imports may take long."""
_LOST = "lost"
"""Key that is set once a rank has found another one lost."""
_LEFT = b"left"
"""Sign of a rank that has ended as it should."""


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that signs of life need."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class Presence:
    """Signs of life of a rank, and a watch on the next rank and on the store, until closed.

    ``connect`` opens a connection to the store that nothing else uses, since it may block. ``end`` ends the process; it
    gets the reason, or "" if another rank says it.
    """

    def __init__(self, rank: int, world_size: int, connect: Callable[[], Store], end: Callable[[str], None]):
        self._own_key = str(rank)
        self._next_key = str((rank + 1) % world_size)
        self._connect = connect
        self._end = end
        self._closed = threading.Event()
        self._last_sign = b""
        self._have_met = False
        self._silent_periods = 0
        self._is_lost = False
        """Whether another rank has said that a host is lost."""
        self._exchanging = threading.Thread(target=self._exchange, name="presence", daemon=True)
        self._exchanging.start()
        threading.Thread(target=self._watch, name="watch on presence", daemon=True).start()

    def all_have_met(self) -> None:
        """Note that every rank has started, so that none is awaited for longer than LOST_SECONDS from now on.

        Without it, a host that is cut off before it has read a first sign would wait as if its next rank imported.
        """
        self._silent_periods = 0
        self._have_met = True

    def close(self) -> None:
        """End the signs; the rank before this one then waits for none."""
        self._closed.set()
        self._exchanging.join(PERIOD_SECONDS)  # it may be waiting for a store that is gone

    def _exchange(self) -> None:
        """Leave signs and read those of the next rank. A request to a lost host waits without end."""
        number = 0
        with suppress(RuntimeError):  # the store is gone, so no sign comes any more, and the watch ends the process
            self._store = self._connect()
            while not self._closed.wait(PERIOD_SECONDS):
                number += 1
                self._store.set(self._own_key, f"{number} {socket.gethostname()}")
                self._is_lost = self._store.check([_LOST])
                # get() would wait for the key
                sign = self._store.get(self._next_key) if self._store.check([self._next_key]) else b""
                if sign != self._last_sign or sign == _LEFT:
                    self._last_sign = sign
                    self._silent_periods = 0
            self._store.set(self._own_key, _LEFT.decode())

    def _watch(self) -> None:
        """End the process after too many periods without news. They are counted because a clock would also count the
        time in which this process itself was stopped."""
        while not self._closed.wait(PERIOD_SECONDS):
            self._silent_periods += 1
            patience = LOST_SECONDS if self._last_sign or self._have_met else START_SECONDS
            if self._is_lost:
                self._end("")
                return
            if self._silent_periods * PERIOD_SECONDS >= patience:
                self._tell_others()
                self._end(self._reason(patience))
                return

    def _tell_others(self) -> None:
        """Let all ranks end at once. The store may be on the lost host, so nothing waits for it here."""

        def tell() -> None:
            with suppress(RuntimeError, AttributeError):  # the store is gone, or was never reached
                self._store.set(_LOST, "")

        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        telling.join(PERIOD_SECONDS)

    def _reason(self, seconds: float) -> str:
        _, _, host = self._last_sign.decode().partition(" ")
        who = f"rank {self._next_key} on {host}" if host else f"rank {self._next_key}"
        return (
            f"no sign of life of {who} in the store for {seconds:.0f} s: its host or that of the store is lost, this "
            "host is cut off, or the process is stopped"
        )


_current: Presence | None = None


def begin(rank: int, world_size: int) -> None:
    """Start the signs of this process at the store of its launch environment, before the process has joined a group."""
    global _current
    # a store that torchrun's agent holds may still have the signs of an earlier start
    kept = os.environ.get(AGENT_STORE) == "True"
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if kept else ""

    def connect() -> Store:
        from torch.distributed import PrefixStore, TCPStore

        address = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=START_SECONDS)
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)
        return PrefixStore(f"pst_ds/presence-{start}", store)

    _current = Presence(rank, world_size, connect, _end_process)


def all_have_met() -> None:
    """Call :meth:`Presence.all_have_met` of this process, if it gives signs."""
    if _current is not None:
        _current.all_have_met()


def close() -> None:
    """End the signs of this process, if there are any."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


def _end_process(reason: str) -> None:
    if reason:
        print(f"pst-ds train: {reason}. Continue from the newest checkpoint with --resume", file=sys.stderr, flush=True)
    record_exit_code(EXIT_STOPPED)
    # sys.exit would only end this thread, and the main thread may be in a collective that never returns
    os._exit(EXIT_STOPPED)
