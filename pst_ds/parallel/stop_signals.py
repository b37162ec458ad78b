"""SIGTERM and SIGUSR1 ask a run to save and stop: handlers note them, and the loop checks at the end of each step."""

import signal
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a run that saved and stopped after a signal; start it again with ``--resume``. EX_TEMPFAIL of BSD's
sysexits.h, "the user is invited to retry"."""

_asked_by = 0


class StoppedError(RuntimeError):
    """A signal asked the run to stop. Callers get it on every rank; training has saved a checkpoint before."""


def install() -> None:
    """Note SIGTERM and SIGUSR1 from now on instead of ending the process. Call it in the main thread."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _note)


def asked_by() -> int:
    """Return the number of the signal that asked this process to stop; 0 for none."""
    return _asked_by


def name_of(number: int) -> str:
    """Return the name of a signal, such as "SIGTERM" for 15."""
    return signal.Signals(number).name


def _note(number: int, frame: FrameType | None) -> None:
    global _asked_by
    _asked_by = number
