"""Write and read a run's JSON Lines files, and read curves from metrics.jsonl. Does not import torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from pst_ds.atomic_files import write_text_atomic
from pst_ds.json_text import json_of

EVALUATION = "eval/"
"""Prefix of the names of evaluation metrics."""
STRAGGLER = "straggler"
"""Name of the event of a slow rank: rank, host, seconds per step, seconds of the median rank."""
Point = tuple[int, float]
"""A step and a finite value."""


class JsonLines:
    """A file that is written line by line. For a run that resumes after ``step``, lines up to that step are kept; with
    step 0 the file starts empty. ``head`` is a first line without a step."""

    def __init__(self, path: Path, step: int, head: Mapping[str, object] | None = None):
        first = [json_of(head)] if head is not None else []
        kept = [json_of(line) for line in lines_until(path, step)] if step else []
        write_text_atomic(path, "".join(f"{line}\n" for line in [*first, *kept]))
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, object]) -> None:
        self._file.write(json_of(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def lines_until(path: Path, step: int) -> Iterator[dict[str, Any]]:
    """Yield the lines with steps up to ``step``, skipping a partial line that a crash may have left."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                found = json.loads(line)
                is_kept = found["step"] <= step
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
            if is_kept:
                yield found


def read_curves(path: Path) -> dict[str, list[Point]]:
    """Read every finite number of metrics.jsonl, by name; the last one where a step has several. Step lines repeat the
    flip rate of the last mask update, so only those of mask updates count."""
    curves: dict[str, list[Point]] = {}
    for line in lines_until(path, sys.maxsize):
        step, event = line.pop("step"), line.pop("event", None)
        line.pop("seconds", None)
        if event == "step":
            line.pop("flip_rate", None)
        elif event == STRAGGLER:
            continue
        for name, value in line.items():
            if is_number(value) and math.isfinite(value):
                points = curves.setdefault(name, [])
                if points and points[-1][0] == step:
                    points.pop()
                points.append((step, value))
    return curves


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
