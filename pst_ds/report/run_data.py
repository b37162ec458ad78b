"""The contents of a run folder for a report: settings, result, curves, layers, checkpoints. Needs no torch."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst_ds.config.toml import flatten
from pst_ds.errors import InputError
from pst_ds.file_names import CHECKPOINTS, LAYERS_FILE, METRICS_FILE, RESULT_FILE, RUN_FILE, links_to, step_folders
from pst_ds.train.monitor.curves import Point, lines_until, read_curves

FIGURES = ("correlation", "score_norm", "update_norm", "weight_norm")
Layers = dict[str, dict[str, float]]
"""Figures by heading, for every layer by name in model order; NaN if unknown."""


def read_layers(path: Path) -> Layers:
    """Return the figures after the last lines, with flips summed over all mask updates. Skip malformed lines; without
    a valid first line the result is empty."""
    try:
        with path.open(encoding="utf-8") as stream:
            head = json.loads(stream.readline())
        names, weights = list(map(str, head["layers"])), np.array(head["weights"], dtype=float)
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if weights.shape != (len(names),):
        return {}
    columns = {"weights": weights}
    for line in lines_until(path, sys.maxsize):
        with suppress(KeyError, TypeError, ValueError):
            if line["event"] == "masks":
                kept, flipped = (_values(line[key], weights) for key in ("kept", "flipped"))
                columns["sparsity"] = 1.0 - kept / weights
                columns["flips in total"] = columns.get("flips in total", 0.0) + flipped
            elif line["event"] == "scores":
                new = {name: _values(line[name], weights) for name in FIGURES}
                columns |= {name: np.where(np.isnan(v), columns.get(name, v), v) for name, v in new.items()}
    return {name: {key: float(column[i]) for key, column in columns.items()} for i, name in enumerate(names)}


def _values(values: object, like: np.ndarray) -> np.ndarray:
    """Return a list as numbers, NaN for None. Raises ValueError for a list of another length."""
    found = np.array(values, dtype=float)
    if found.shape != like.shape:
        raise ValueError(f"not a list of {len(like)}")
    return found


@dataclass(frozen=True, slots=True)
class RunData:
    """A run, from its folder."""

    name: str
    """A short name, unique in the report."""
    folder: Path
    run_file: str
    settings: Mapping[str, object]
    """Settings by dotted name."""
    result: dict[str, Any]
    """The result; empty for an unfinished run."""
    curves: dict[str, list[Point]]
    """Curves by their names in metrics.jsonl, in order of steps."""
    layers: Layers
    checkpoints: dict[str, dict[str, object]]
    """Facts about every finished checkpoint, by heading."""

    @property
    def last_step(self) -> int:
        """The largest step of any curve."""
        return max([0, *(points[-1][0] for points in self.curves.values())])

    def last(self, curve: str) -> float | None:
        """Return the last value of a curve, or None."""
        return self.curves[curve][-1][1] if self.curves.get(curve) else None


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read the runs. Raises InputError for a folder that is damaged, is not a run, or is named twice."""
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise InputError(f"{str(folder)!r} is named twice. Name every run once")
    return [_read_run(folder, name) for folder, name in zip(folders, short_names(resolved), strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the paths of the folders below the last folder that contains them all."""
    above = os.path.commonpath([folder.parent for folder in folders])
    return [os.path.relpath(folder, above) for folder in folders]


def _read_run(folder: Path, name: str) -> RunData:
    if not (folder / RUN_FILE).is_file():
        raise InputError(
            f"{str(folder)!r} is not a run folder: {RUN_FILE} is missing (looked in {folder.absolute()}). Name the "
            "output_dir of a run"
        )
    try:
        run_file = (folder / RUN_FILE).read_text(encoding="utf-8-sig")
        settings = flatten(tomllib.loads(run_file))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / RUN_FILE} is not TOML: {error}") from None
    result, curves = _read_result(folder / RESULT_FILE), read_curves(folder / METRICS_FILE)
    layers, checkpoints = read_layers(folder / LAYERS_FILE), dict(_checkpoints(folder))
    return RunData(name, folder, run_file, settings, result, curves, layers, checkpoints)


def _read_result(path: Path) -> dict[str, Any]:
    """Read result.json; {} if it is missing. Raises InputError if it is damaged."""
    try:
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(result, dict):
        raise InputError(f"{str(path)!r} does not contain a JSON object")
    return result


def _checkpoints(run: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the checkpoints, oldest first, without unreadable ones, which ``inspect`` and ``--resume`` report."""
    for path in reversed(step_folders(run / CHECKPOINTS)):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            state = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["state"]
            facts = {"links": ", ".join(links_to(path)), "step": state["step"], "sparsity": state.get("sparsity")}
            size = sum(file.stat().st_size for file in path.iterdir())
            yield path.name, facts | (state.get("metrics") or {}) | {"size in bytes": size}
