"""Fit the error of pruned models against training steps, from grids whose data sets differ in their number of steps.

    python -m tools.quality.curves tools/quality/curve-minilm.toml

Per method, error(n) = floor + scale * n ** -power, the form of arXiv 2001.08361, is fitted to the means over seeds. To
judge an extrapolation, the longest run is also predicted from the shorter ones.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pst_ds.text_table import aligned
from tools.quality.__main__ import RESULTS
from tools.quality.cells import Line, Lines
from tools.quality.grid import Grid, load_grid

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """Error of a method after some steps, 0 without training: percent of wrong labels, or nats per token."""

    steps: int
    mean: float
    error_bar: float
    """Standard error: over seeds, or of the test examples for a single seed; nan if neither is known."""
    seeds: int


@dataclass(frozen=True)
class Curve:
    """error(n) = floor + scale * n ** -power."""

    floor: float
    scale: float
    power: float

    def at(self, steps: float) -> float:
        return self.floor + self.scale * steps**-self.power


def points_of(grid: Grid, lines: Mapping[str, Line]) -> dict[str, list[Point]]:
    """Return the points of each method, by increasing steps."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for line in lines.values():
        if line["outcome"] == "done" and line["kind"] == "cell" and line["data_set"] in grid.data_sets:
            metrics = next(iter(line["tests"].values()))
            found[line["method"], line.get("steps", 0)].append(_error(grid, metrics))
    by_method: dict[str, list[Point]] = defaultdict(list)
    for (method, steps), errors in sorted(found.items()):
        values = [value for value, _ in errors]
        bar = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else errors[0][1]
        by_method[method].append(Point(steps, statistics.mean(values), bar, len(values)))
    return dict(by_method)


def _error(grid: Grid, metrics: Mapping[str, float]) -> tuple[float, float]:
    """Return the error and the standard error that its test examples cause."""
    if grid.metric != "accuracy":
        return metrics["loss"], math.nan
    wrong, path = 1.0 - metrics["accuracy"], Path(next(iter(grid.data_sets.values())).tests["test"])
    if not path.is_file():
        return 100 * wrong, math.nan
    with path.open(encoding="utf-8") as file:
        examples = sum(1 for _ in file)
    return 100 * wrong, 100 * math.sqrt(wrong * (1 - wrong) / examples)


def fit(points: Sequence[Point]) -> Curve:
    """Fit the curve to at least four points by least squares; the floor is not negative."""
    from scipy.optimize import curve_fit

    def error(steps: Floats, floor: float, scale: float, power: float) -> Floats:
        return floor + scale * (steps / first) ** -power

    first = points[0].steps
    steps = np.array([point.steps for point in points], dtype=float)
    means = np.array([point.mean for point in points])
    start = (means[-1], max(means[0] - means[-1], 1e-3), 0.5)
    (floor, scale, power), _ = curve_fit(
        error, steps, means, p0=start, bounds=([0, 0, 0.05], [np.inf, np.inf, 4]), max_nfev=20000
    )
    return Curve(float(floor), float(scale * first**power), float(power))


def report(grid: Grid, lines: Mapping[str, Line]) -> str:
    """Return two tables: the points, and what the fits predict."""
    by_method = points_of(grid, lines)
    steps = sorted({point.steps for points in by_method.values() for point in points})
    rows = [["method", *(f"{n} steps" for n in steps)]]
    fits = [["method", "floor", "power", "longest run", "predicted from the others", "twice the steps", "four times"]]
    for method, points in by_method.items():
        found = {point.steps: point for point in points}
        rows.append([grid.methods[method].title, *(_shown(found.get(n)) for n in steps)])
        if len(points) > 4:
            curve, before = fit(points), fit(points[:-1])
            last = points[-1]
            numbers = (curve.floor, curve.power, last.mean, before.at(last.steps))
            later = (curve.at(2 * last.steps), curve.at(4 * last.steps))
            fits.append([grid.methods[method].title, *(f"{number:.3g}" for number in (*numbers, *later))])
    return "\n".join([*aligned(rows), "", *aligned(fits)])


def _shown(point: Point | None) -> str:
    if point is None:
        return ""
    bar = "" if math.isnan(point.error_bar) else f" ± {point.error_bar:.2g}"
    return f"{point.mean:.4g}{bar} ({point.seeds})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for path in args.grids:
        grid = load_grid(path)
        print(f"{grid.title}\n\n{report(grid, Lines(args.results / f'{grid.name}.jsonl').by_id)}\n")


if __name__ == "__main__":
    main()
