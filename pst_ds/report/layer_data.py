"""The contents of layers.jsonl, read with bounded memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, cast

from pst_ds.train.monitor.images import MaskHistory
from pst_ds.train.monitor.jsonl import lines_until

T = TypeVar("T")
FIGURES = ("correlation", "score_norm", "update_norm", "weight_norm")
_MOST_PICTURES = 64
"""Most pictures held per layer, in addition to the last one."""


class Picture(TypedDict, total=False):
    """A line of layers.jsonl with a histogram of scores, or with a thumbnail of a mask."""

    step: int
    low: float
    high: float
    kept: list[int]
    """Kept weights in each bin from ``low`` to ``high``."""
    pruned: list[int]
    threshold: float | None
    share: list[list[float]]
    """Share of kept weights in each cell of the thumbnail."""


_PICTURES = {"histogram": {"low", "high", "kept", "pruned", "threshold"}, "thumbnail": {"share"}}


class EvenlyApart(Generic[T]):
    """Every k-th item of a stream and its last one: at most ``most`` (at least 2) and one more. k doubles as needed."""

    def __init__(self, most: int):
        self._most, self._stride, self._seen = most, 1, 0
        self._kept: list[T] = []
        self._last: list[T] = []
        """The last item, unless it is among the kept."""

    @property
    def items(self) -> list[T]:
        return self._kept + self._last

    def add(self, item: T) -> None:
        is_kept = self._seen % self._stride == 0
        self._seen += 1
        self._last = [] if is_kept else [item]
        self._kept += [item] if is_kept else []
        if len(self._kept) > self._most:
            self._last = self._kept[-1:] if len(self._kept) % 2 == 0 else []
            self._kept, self._stride = self._kept[::2], 2 * self._stride


@dataclass(slots=True)
class LayerData:
    """The layers of a run, in model order."""

    names: list[str]
    weights: list[int]
    history: MaskHistory
    update_steps: list[int] = field(default_factory=list)
    """Steps of the mask updates."""
    kept: list[int] = field(default_factory=list)
    """Weights of each layer after the last mask update; empty before the first."""
    flipped: list[int] = field(default_factory=list)
    """Mask bits of each layer that flipped, over all mask updates."""
    last_flipped: list[int] = field(default_factory=list)
    """Mask bits of each layer that flipped in the last mask update."""
    ranks: list[int] = field(default_factory=list)
    """Components that each layer's update keeps after the last choice; empty without learned ranks."""
    figures: dict[str, list[float | None]] = field(default_factory=dict)
    """The last known value of each of FIGURES for every layer; None if unknown."""
    pictures: dict[str, dict[int, EvenlyApart[Picture]]] = field(default_factory=lambda: {e: {} for e in _PICTURES})
    """Pictures by event and layer: the first, the last and some at even intervals."""

    def sparsity(self, layer: int) -> float | None:
        """Return the sparsity after the last mask update."""
        return 1.0 - self.kept[layer] / self.weights[layer] if self.kept and self.weights[layer] else None

    def column_steps(self) -> list[tuple[int, int]]:
        """Return the steps of the first and the last mask update of each column of the history."""
        size, steps = self.history.merged, self.update_steps
        return [(steps[i], steps[min(i + size, len(steps)) - 1]) for i in range(0, len(steps), size)]


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
    layers = LayerData(names, weights, MaskHistory(weights))
    for line in lines_until(path, sys.maxsize):
        try:
            _add(layers, line)
        except (KeyError, TypeError, ValueError):
            continue
    return layers


def _add(layers: LayerData, line: dict[str, Any]) -> None:
    count, event = len(layers.names), line["event"]
    if event == "masks":
        kept, flipped = (_list_of(line[key], count) for key in ("kept", "flipped"))
        layers.history.add(kept, flipped)
        layers.update_steps.append(line["step"])
        layers.kept, layers.last_flipped = kept, flipped
        layers.flipped = [a + b for a, b in zip(layers.flipped or [0] * count, flipped, strict=True)]
    elif event == "ranks":
        layers.ranks = _list_of(line["kept"], count)
    elif event == "scores":
        for name in FIGURES:
            new, old = _list_of(line[name], count), layers.figures.get(name, [None] * count)
            layers.figures[name] = [b if a is None else a for a, b in zip(new, old, strict=True)]
    elif event in _PICTURES and _PICTURES[event] <= line.keys() and 0 <= line["layer"] < count:
        layers.pictures[event].setdefault(line["layer"], EvenlyApart(_MOST_PICTURES)).add(cast("Picture", line))


def _list_of(values: object, count: int) -> list[Any]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"not a list of {count}")
    return values


def spread(items: Sequence[T], most: int) -> list[T]:
    """Pick at most ``most`` (at least 2) of ``items`` at even intervals, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
