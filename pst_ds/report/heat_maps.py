"""Heat maps of layers and experts, as the page shows them."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pst_ds.core.experts.tokens import of_equal_numbers, shares_of_zeros
from pst_ds.report.charts import LEFT, RIGHT, Tick, short, whole
from pst_ds.report.run_data import RunData
from pst_ds.train.monitor.images import FLIP_DECADES, flips_on_scale, png_of, shaded, share_on_scale


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Layers from top to bottom, mask updates or experts from left to right; one pixel per cell."""

    title: str
    note: str
    png: str
    """A data URI."""
    scale: tuple[str, str]
    """The values of the lowest and the highest colour."""
    ticks: list[Tick]
    layers: list[str]
    columns: list[str]
    """Label of each column."""
    values: str
    """All cells, row by row: little-endian float32 in base64."""
    column: str = "step"
    """Name of a column."""


def heat_maps(run: RunData) -> Iterator[HeatMap]:
    """Yield the maps of sparsity and flips, if the run has updated its masks."""
    layers = run.layers
    if layers is None or not layers.update_steps:
        return
    sparsity, flips, columns = layers.history.sparsity(), layers.history.flips(), layers.column_steps()
    texts = [whole(first) if first == last else f"{first:,} to {last:,}" for first, last in columns]
    axes = layers.names, [first for first, _ in columns], texts
    low, high = FLIP_DECADES
    yield _heat_map("Sparsity", "fraction of pruned weights", sparsity, sparsity, ("0", "1"), *axes)
    scale = (f"{10**low:.3%} or less", f"{10**high:.0%} or more")
    yield _heat_map("Flips", "of mask bits, log scale", flips, flips_on_scale(flips), scale, *axes)


def _heat_map(
    title: str,
    note: str,
    values: np.ndarray,
    on_scale: np.ndarray,
    scale: tuple[str, str],
    layers: list[str],
    numbers: Sequence[int],
    columns: list[str],
    column: str = "step",
) -> HeatMap:
    """Draw ``values``, coloured by ``on_scale``, and label the first, middle and last of the columns by ``numbers``."""
    count = len(numbers)
    shown = sorted({0, count // 2, count - 1})
    ticks = [Tick(round(LEFT + (i + 0.5) / count * (RIGHT - LEFT), 1), short(numbers[i])) for i in shown]
    cells = base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
    png = f"data:image/png;base64,{base64.b64encode(png_of(shaded(on_scale), smallest=True)).decode('ascii')}"
    return HeatMap(title, note, png, scale, ticks, layers, columns, cells, column)


def expert_maps(run: RunData) -> Iterator[HeatMap]:
    """Yield the maps of tokens and of sparsity, one per number of experts, if the run has finished and counted them."""
    for table in _tables(run, "expert_tokens"):
        rows = np.array(list(table.values()), dtype=float)
        relative = rows / np.maximum(rows.mean(1, keepdims=True), 1e-9)
        on_scale = np.concatenate([share_on_scale([row]) for row in rows])
        scale = ("0", "2 or more")
        yield _expert_map("Tokens of experts", "over the mean of their module", table, relative, on_scale, scale)
    weights = dict(zip(run.layers.names, run.layers.weights, strict=True)) if run.layers else {}
    for table in _tables(run, "expert_zeros"):
        known = {name: row for name, row in table.items() if weights.get(name)}
        if known:
            share = np.array([shares_of_zeros(row, weights[name]) for name, row in known.items()])
            yield _expert_map("Sparsity of experts", "fraction of pruned weights", known, share, share, ("0", "1"))


def _tables(run: RunData, key: str) -> list[dict[str, Sequence[int]]]:
    counts = run.result.get(key)
    return of_equal_numbers(counts) if isinstance(counts, dict) else []


def _expert_map(
    title: str, note: str, table: Iterable[str], values: np.ndarray, on_scale: np.ndarray, scale: tuple[str, str]
) -> HeatMap:
    numbers = range(values.shape[1])
    return _heat_map(title, note, values, on_scale, scale, list(table), numbers, [*map(str, numbers)], "expert")
