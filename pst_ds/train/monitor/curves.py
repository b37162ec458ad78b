"""Curves of a run, as metrics.jsonl has them. Needs no torch."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TypeGuard

from pst_ds.train.monitor.jsonl import lines_until

EVALUATION = "eval/"
"""The names of what evaluations measure begin so."""
DENSE = "/dense"
"""The names of the losses of a dense run at the same steps end so."""
STRAGGLER = "straggler"
"""The event of a rank that the others wait for: rank, host, seconds of a step, those of the median rank."""
Point = tuple[int, float]
"""A step and a finite value."""


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


def named_stragglers(path: Path) -> list[dict[str, object]]:
    """Read the events of ranks that the others waited for."""
    return [line for line in lines_until(path, sys.maxsize) if line.get("event") == STRAGGLER]


def batch_losses(path: Path, until: int = sys.maxsize) -> list[Point]:
    """Read the training loss of every batch up to step ``until``: a line has those since the line before, of
    skipped steps too. Lines of older runs have their mean alone, which counts as one batch."""
    found: list[Point] = []
    for line in lines_until(path, until):
        if line.get("event") != "step":
            continue
        losses = line.get("losses")
        values = losses if isinstance(losses, list) and losses else [line.get("loss")]
        first = found[-1][0] if found else 0
        for i, value in enumerate(values, start=1):
            if is_number(value) and math.isfinite(value):
                found.append((first + round(i / len(values) * (line["step"] - first)), value))
    return found


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
