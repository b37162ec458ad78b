"""SIGTERM and SIGUSR1 ask a run to save and stop: the handlers note it, and the loop asks at the end of each step."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a run that was stopped by a signal and saved: start it again with ``--resume``. EX_TEMPFAIL of BSD's
sysexits.h, "the user is invited to retry"."""

_asked_by = 0


def install() -> None:
    """Note SIGTERM and SIGUSR1 from now on instead of ending the process. Only the main thread may."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def asked_by() -> int:
    """The number of the signal that asked this process to stop; 0 for none."""
    return _asked_by


def name_of(number: int) -> str:
    """ "SIGTERM" for 15."""
    return signal.Signals(number).name


def _note(number: int, frame: FrameType | None) -> None:
    global _asked_by
    _asked_by = number
