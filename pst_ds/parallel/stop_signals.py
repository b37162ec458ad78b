"""SIGTERM and SIGUSR1 ask a run to save and stop: handlers note them, and the loop checks at the end of each step."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType

from pst_ds.file_names import EXIT_CODES_VARIABLE

EXIT_STOPPED = 75
"""Exit code of a run that saved and stopped after a signal, or has lost a host; start it again with ``--resume``.
EX_TEMPFAIL of BSD's sysexits.h, "the user is invited to retry"."""
EXIT_INPUT = 2
"""Exit code after invalid input, which another start does not mend."""

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


def record_exit_code(code: int) -> None:
    """Write this rank's exit code where the launch script looks for it, since some launchers lose it."""
    if folder := os.environ.get(EXIT_CODES_VARIABLE):
        with suppress(OSError):
            (Path(folder) / f"rank-{os.environ.get('RANK', '0')}").write_text(f"{code}\n", encoding="utf-8")


def end_elastic_torchrun(code: int) -> None:
    """Ask torchrun to end after invalid input: it would start the ranks again after every exit code but 0."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    # one rank of the host is enough, and a second signal would interrupt torchrun while it ends
    if code == EXIT_INPUT and restarts and os.environ.get("LOCAL_RANK") == "0":
        os.kill(os.getppid(), signal.SIGTERM)


def _note(number: int, frame: FrameType | None) -> None:
    global _asked_by
    _asked_by = number
