"""The exit codes of ranks, which some launchers lose: a rank leaves its own where ``pst-ds launch`` looks for it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pst_ds.file_names import EXIT_CODES_VARIABLE


def leave_code(code: int) -> None:
    """Write the exit code of this rank, if ``pst-ds launch`` wants it."""
    if folder := os.environ.get(EXIT_CODES_VARIABLE):
        with suppress(OSError):
            (Path(folder) / f"rank-{os.environ.get('RANK', '0')}").write_text(f"{code}\n", encoding="utf-8")


def rank_codes(folder: Path) -> list[int]:
    """Return the exit codes that ranks left in ``folder``; one that was killed leaves none."""
    codes = []
    for path in folder.iterdir():
        with suppress(OSError, ValueError):
            codes.append(int(path.read_text(encoding="utf-8")))
    return codes
