"""Exit codes of ranks, in files for ``pst-ds launch``, because some launchers lose them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pst_ds.file_names import EXIT_CODES_VARIABLE


def leave_code(code: int) -> None:
    """Write the exit code of this rank if it runs under ``pst-ds launch``."""
    if folder := os.environ.get(EXIT_CODES_VARIABLE):
        with suppress(OSError):
            (Path(folder) / f"rank-{os.environ.get('RANK', '0')}").write_text(f"{code}\n", encoding="utf-8")


def rank_codes(folder: Path) -> list[int]:
    """Return the exit codes of ranks in ``folder``; killed ranks are missing."""
    codes = []
    for path in folder.iterdir():
        with suppress(OSError, ValueError):
            codes.append(int(path.read_text(encoding="utf-8")))
    return codes
