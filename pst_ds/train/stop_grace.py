"""A stop whose grace may end before the step does: what the last step has left is saved, and the process leaves."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from pst_ds.checkpoint.format import CheckpointState
from pst_ds.checkpoint.held import HeldSave, HeldStates
from pst_ds.parallel import stop_signals
from pst_ds.parallel.ranks import is_main
from pst_ds.parallel.store_group import StoreGroup
from pst_ds.supervise.exit_codes import leave_code
from pst_ds.train.divergence import DivergedError

_SAVE_AT, _LEAVE_AT = 0.5, 0.9
"""Shares of the grace after which the held state is saved, and the process leaves a step that has not ended."""
_POLL_SECONDS = 1.0


class StoppedError(RuntimeError):
    """The run was asked to stop by a signal, and saved; raised on every rank."""


class StopGrace:
    """Listens, in a thread, for a signal to any rank that asks the run to stop. When half of the grace is over and the
    run is not, all ranks save what they hold of the last step that each of them has ended; when nine tenths are over,
    they leave with the code of a stopped run. Making it is collective.

    Args:
        grace_seconds: Time from the signal to the kill.
        held: What :meth:`HeldStates.hold` was called on after each step.
        when_saved: Called on rank 0 with the state that was written.
        describe: Says how the run ended, from the signal's number and the step that it can go on after.
    """

    def __init__(
        self,
        grace_seconds: float,
        held: HeldStates,
        when_saved: Callable[[CheckpointState], None],
        describe: Callable[[int, int], str],
    ):
        self._grace, self._held, self._when_saved, self._describe = grace_seconds, held, when_saved, describe
        self._group = StoreGroup(held.group)
        self._over = threading.Event()
        self._saved: tuple[int, HeldSave] | None = None

    def __enter__(self) -> StopGrace:
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """From here on nothing ends this process. Raises StoppedError if a rank that has left cut this one off."""
        self._over.set()
        if self._saved and isinstance(error, RuntimeError) and not isinstance(error, DivergedError):
            raise StoppedError(self._describe(self._saved[0], self._saved[1].step)) from None

    def _listen(self) -> None:
        number, deadline = self._asked()
        if not number or self._over.wait(self._until(deadline, 1 - _SAVE_AT)):
            return
        with suppress(Exception):  # of the exchange: another rank is gone, which training will hear of
            saved = self._held.save(self._when_saved)
            if saved.error:
                self._say(f"WARNING: the state after step {saved.step} could not be written: {saved.error}")
                return
            self._saved = number, saved
            if not self._over.wait(self._until(deadline, 1 - _LEAVE_AT)):
                self._leave(number, saved, self._until(deadline, 0.0))

    def _asked(self) -> tuple[int, float]:
        """Wait until a rank is asked to stop; return the signal and when its grace ends; (0, 0) if the run ends."""
        while not self._over.is_set():
            own = stop_signals.wait(min(_POLL_SECONDS, self._grace / 20))
            if own:
                with suppress(Exception):  # the store is gone with rank 0
                    self._group.announce(f"{own}")
                return own, time.monotonic() + self._grace
            try:
                word = self._group.announced()
            except Exception:
                return 0, 0.0
            if word:
                return int(word), time.monotonic() + self._grace
        return 0, 0.0

    def _until(self, deadline: float, remaining: float) -> float:
        """Return the seconds until this share of the grace remains."""
        return max(0.0, deadline - remaining * self._grace - time.monotonic())

    def _leave(self, number: int, saved: HeldSave, seconds: float) -> None:
        self._say(f"pst-ds train: StoppedError: {self._describe(number, saved.step)}")
        leave_code(stop_signals.EXIT_STOPPED)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        with suppress(Exception):  # the store is gone with rank 0
            self._group.leave_last(seconds)
        os._exit(stop_signals.EXIT_STOPPED)

    @staticmethod
    def _say(text: str) -> None:
        if is_main():
            print(text, file=sys.stderr, flush=True)
