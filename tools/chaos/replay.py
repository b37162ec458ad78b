"""Train a run for some steps and stop as after a signal: ``torchrun -m tools.chaos.replay STEPS RUN.toml ...``.

0 trains to the end. The steps are exact, unlike those of a real signal.
"""

from __future__ import annotations

import signal
import sys

from pst_ds.cli.main import program
from pst_ds.parallel import stop_signals


def main() -> None:
    most = int(sys.argv[1])
    asked = 0

    def asked_by() -> int:
        """Return SIGTERM in the last step of the stretch: each step asks once whether a signal came."""
        nonlocal asked
        asked += 1
        return int(signal.SIGTERM) if asked == most else 0

    if most:
        stop_signals.asked_by = asked_by
    sys.argv = ["pst-ds", "train", *sys.argv[2:]]
    program()


if __name__ == "__main__":
    main()
