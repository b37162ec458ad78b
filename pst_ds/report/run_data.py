"""The contents of a run folder for a report: settings, result, curves, layers, checkpoints. Needs no torch."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst_ds.config.toml import flatten
from pst_ds.errors import InputError
from pst_ds.file_names import CHECKPOINTS, LAYERS_FILE, METRICS_FILE, RESULT_FILE, RUN_FILE, links_to, step_folders
from pst_ds.train.monitor.curves import Point, lines_until, named_stragglers, read_curves

FIGURES = ("correlation", "score_norm", "update_norm", "weight_norm")


@dataclass(slots=True)
class LayerData:
    """The layers of a run, in model order."""

    names: list[str]
    weights: list[int]
    kept: list[int] = field(default_factory=list)
    """Weights of each layer after the last mask update; empty before the first."""
    flipped: list[int] = field(default_factory=list)
    """Mask bits of each layer that flipped, over all mask updates."""
    figures: dict[str, list[float | None]] = field(default_factory=dict)
    """The last known value of each of FIGURES for every layer; None if unknown."""

    def sparsity(self, layer: int) -> float | None:
        """Return the sparsity after the last mask update."""
        return 1.0 - self.kept[layer] / self.weights[layer] if self.kept and self.weights[layer] else None


def read_layers(path: Path) -> LayerData | None:
    """Read the file, skipping malformed lines. Returns None without a file or a valid first line."""
    try:
        with path.open(encoding="utf-8") as stream:
            head = json.loads(stream.readline())
        names, weights = list(map(str, head["layers"])), list(map(int, head["weights"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not names or len(names) != len(weights):
        return None
    layers = LayerData(names, weights)
    for line in lines_until(path, sys.maxsize):
        try:
            _add(layers, line)
        except (KeyError, TypeError, ValueError):
            continue
    return layers


def _add(layers: LayerData, line: dict[str, Any]) -> None:
    count, event = len(layers.names), line["event"]
    if event == "masks":
        layers.kept, flipped = (list(map(int, _list_of(line[key], count))) for key in ("kept", "flipped"))
        layers.flipped = [a + b for a, b in zip(layers.flipped or [0] * count, flipped, strict=True)]
    elif event == "scores":
        for name in FIGURES:
            new, old = _list_of(line[name], count), layers.figures.get(name, [None] * count)
            layers.figures[name] = [b if a is None else a for a, b in zip(new, old, strict=True)]


def _list_of(values: object, count: int) -> list[Any]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"not a list of {count}")
    return values


@dataclass(frozen=True, slots=True)
class CheckpointData:
    """A finished checkpoint, from its manifest."""

    name: str
    links: list[str]
    step: int
    sparsity: float | None
    metrics: dict[str, float]
    nbytes: int


@dataclass(frozen=True, slots=True)
class RunData:
    """A run, from its folder."""

    name: str
    """A short name, unique in the report."""
    folder: Path
    run_file: str
    settings: dict[str, object]
    """Settings by dotted name."""
    result: dict[str, object]
    """The result; empty for an unfinished run."""
    curves: dict[str, list[Point]]
    """Curves by their names in metrics.jsonl, in order of steps."""
    layers: LayerData | None
    checkpoints: list[CheckpointData]
    stragglers: list[dict[str, object]]
    """Events about the slowest rank, as in metrics.jsonl."""

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
    """Return the shortest path endings that distinguish the folders."""
    for depth in range(1, max(len(folder.parts) for folder in folders)):
        names = [str(Path(*folder.parts[-depth:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


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
    result = _read_result(folder / RESULT_FILE)
    metrics, checkpoints = folder / METRICS_FILE, list(_checkpoints(folder / CHECKPOINTS))
    curves, layers, slow = read_curves(metrics), read_layers(folder / LAYERS_FILE), named_stragglers(metrics)
    return RunData(name, folder, run_file, settings, result, curves, layers, checkpoints, slow)


def _read_result(path: Path) -> dict[str, object]:
    """Read result.json; {} if it is missing. Raises InputError if it is damaged."""
    try:
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(result, dict):
        raise InputError(f"{str(path)!r} does not contain a JSON object")
    return result


def _checkpoints(folder: Path) -> Iterator[CheckpointData]:
    """Yield the checkpoints, oldest first, without unreadable ones, which ``inspect`` and ``--resume`` report."""
    for path in reversed(step_folders(folder)):
        try:
            state = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["state"]
            sparsity, metrics = state.get("sparsity"), state.get("metrics") or {}
            nbytes = sum(file.stat().st_size for file in path.iterdir())
            yield CheckpointData(path.name, links_to(path), state["step"], sparsity, metrics, nbytes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
