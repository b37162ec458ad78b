"""Write and read a run's JSON Lines files. Does not import torch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pst_ds.atomic_files import write_text_atomic
from pst_ds.json_text import json_of

EVALUATION = "eval/"
"""Prefix of the names of evaluation metrics."""
STRAGGLER = "straggler"
"""Name of the event of a slow rank: rank, host, seconds per step, seconds of the median rank."""


class JsonLines:
    """A file that is written line by line. For a run that resumes after ``step``, lines up to that step are kept; with
    step 0 the file starts empty. ``head`` is a first line without a step."""

    def __init__(self, path: Path, step: int, head: Mapping[str, object] | None = None):
        lines: list[str] = []
        if head is not None:
            lines.append(json_of(head))
        if step:
            # Lines after the checkpoint come again, from the steps that are repeated.
            lines.extend(json_of(line) for line in lines_until(path, step))
        # atomically: a kill while the file is written again would lose the history of the run
        write_text_atomic(path, "".join(line + "\n" for line in lines))
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, object]) -> None:
        self._file.write(json_of(line) + "\n")
        self._file.flush()  # so that a killed process loses no line, and others can follow the run

    def close(self) -> None:
        self._file.close()


def lines_until(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """Yield the lines with steps up to ``step``, skipping a partial line that a crash may have left."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                values = json.loads(line)
                is_kept = values["step"] <= step
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            if is_kept:
                yield values
