"""SIGTERM and SIGUSR1 ask a run to save and stop: the handlers note it, and the loop asks at the end of each step."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a run that was stopped by a signal and saved: start it again with ``--resume``. EX_TEMPFAIL of BSD's
sysexits.h, "the user is invited to retry"."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_asked_by = 0
_arrivals: tuple[int, int] | None = None
"""The two ends of a pipe through which signals arrive at once, whatever the main thread does."""


def install() -> None:
    """Note SIGTERM and SIGUSR1 from now on instead of ending the process. Only the main thread may."""
    global _arrivals
    for number in _SIGNALS:
        signal.signal(number, _note)
    before, _arrivals = _arrivals, os.pipe()
    for end in _arrivals:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(_arrivals[1], warn_on_full_buffer=False)
    for end in before or ():  # of an earlier call, perhaps in the process that this one was forked from
        os.close(end)


def asked_by() -> int:
    """The number of the signal that asked this process to stop; 0 for none."""
    return _asked_by


def wait(seconds: float) -> int:
    """Return what :func:`asked_by` does as soon as there is a signal, after ``seconds`` at the latest. For one thread
    beside the main one, whose handlers run only between two calls into a library."""
    if asked_by():
        return asked_by()
    poll = select.poll()  # select would refuse the numbers of files that a rank of thousands opens
    if _arrivals is not None:
        poll.register(_arrivals[0], select.POLLIN)
    for end, _ in poll.poll(round(1000 * seconds)):
        with contextlib.suppress(BlockingIOError):
            for number in os.read(end, 64):
                if number in _SIGNALS:
                    _note(number, None)
    return asked_by()


def name_of(number: int) -> str:
    """ "SIGTERM" for 15."""
    return signal.Signals(number).name


def _note(number: int, frame: FrameType | None) -> None:
    global _asked_by
    _asked_by = number
