"""Figures of the lines: values over seeds, their means and standard errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from pst_ds.config.toml import flatten
from tools.quality.cells import Line, cell_of
from tools.quality.grid import Grid, Table


@dataclass(frozen=True)
class Figure:
    """A mean over seeds. ``error`` is its standard error, unknown of one seed."""

    mean: float
    error: float | None
    seeds: int


def lines_of(grid: Grid, lines: Mapping[str, Line], data_set: str, method: str, sparsity: str) -> list[Line]:
    """The finished cells of one place in the table, by seed; none at a sparsity that the method leaves out."""
    found: list[Line] = []
    if sparsity not in grid.sparsities_of(grid.methods[method], data_set):
        return found
    for seed in grid.seeds_of(grid.methods[method], sparsity):
        cell = cell_of(grid, lines, "cell", data_set, method, sparsity, seed)
        line = lines.get(cell.id) if cell else None
        if line is not None and line["outcome"] == "done":
            found.append(line)
    return found


def figure_of(values: list[float]) -> Figure | None:
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Figure(statistics.fmean(values), error, len(values))


def figure(
    grid: Grid, lines: Mapping[str, Line], data_set: str, method: str, sparsity: str, test: str = "", metric: str = ""
) -> Figure | None:
    """Of a test, the first by default, and of a metric, the grid's by default; None without a finished cell."""
    test, metric = test or test_names(grid, data_set)[0], metric or grid.metric
    found = lines_of(grid, lines, data_set, method, sparsity)
    return figure_of([line["tests"][test][metric] for line in found])


def test_names(grid: Grid, data_set: str) -> list[str]:
    return list(grid.data_sets[data_set].tests) or ["test"]


def number(value: float, metric: str) -> str:
    """A value as the page shows it: perplexities and losses as they are, others in percent."""
    if metric == "loss":
        return f"{value:.3f}"
    if metric.endswith("perplexity"):
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
    return f"{100 * value:.2f}"


def shown(figure: Figure | None, metric: str) -> str:
    """ "82.31 ± 0.24 (3)": mean, standard error and number of seeds; without an error for one seed."""
    if figure is None:
        return ""
    error = "" if figure.error is None else f" ± {number(figure.error, metric)}"
    return f"{number(figure.mean, metric)}{error} ({figure.seeds})"


def settings_text(settings: Table) -> str:
    """`train.head_learning_rate = 0.0002` and the like, after one another."""
    return ", ".join(f"`{name} = {value}`" for name, value in flatten(settings).items())
