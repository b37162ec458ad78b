"""Plots of the results table as SVG on a white ground of their own, so that they read on a dark page too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.quality.cells import Line
from tools.quality.grid import Grid, zeros
from tools.quality.stats import Figure, figure, test_names

COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#555555", "#a6761d", "#1b9e77"
)  # fmt: skip
"""Told apart by most eyes; a marker of its own goes with each."""
MARKERS = "osD^vP*X<>"


def write_plots(grid: Grid, lines: Mapping[str, Line], folder: Path) -> dict[tuple[str, str], str]:
    """One plot for each (data set, test) that has a figure; its path beside the page."""
    written = {}
    for data_set in grid.data_sets:
        for test in test_names(grid, data_set):
            curves = curves_of(grid, lines, data_set, test)
            if any(curves.values()):
                name = f"{grid.name}-{data_set}-{test}.svg" if test != data_set else f"{grid.name}-{data_set}.svg"
                _draw(grid, curves, f"{grid.data_sets[data_set].title}: {test}", folder / name)
                written[data_set, test] = f"{folder.name}/{name}"
    return written


def curves_of(grid: Grid, lines: Mapping[str, Line], data_set: str, test: str) -> dict[str, dict[str, Figure]]:
    """For each method its figures by sparsity."""
    curves = {}
    for method in grid.methods_of(data_set):
        if method.plot:
            figures = {s: figure(grid, lines, data_set, method.name, s, test) for s in grid.sparsities_of(method)}
            curves[method.name] = {s: f for s, f in figures.items() if f is not None}
    return curves


def _draw(grid: Grid, curves: Mapping[str, Mapping[str, Figure]], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    style: Any = {"svg.hashsalt": "pst-ds", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        drawing, axes = plt.subplots(figsize=(7.2, 4.2), facecolor="white")
        ticks = _positions(curves)
        for i, (name, figures) in enumerate(curves.items()):
            look = {"color": COLORS[i % len(COLORS)], "label": grid.methods[name].title}
            if list(figures) == ["0"]:
                _draw_dense(grid, axes, figures["0"], look)
            elif figures:
                aside = 0.36 * (i / max(len(curves) - 1, 1) - 0.5)  # or equal points would hide each other
                _draw_method(grid, axes, figures, ticks, aside, {**look, "marker": MARKERS[i % len(MARKERS)]})
        axes.set_xticks(list(ticks.values()), [s if ":" in s else f"{100 * float(s):g} %" for s in ticks])
        axes.set_xlim(-0.5, max(ticks.values(), default=0.0) + 0.5)
        axes.set_xlabel("zeros in the pruned layers")
        axes.set_ylabel(grid.metric if grid.lower_is_better else f"{grid.metric} in %")
        if grid.metric == "perplexity":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(mpl.ticker.LogFormatter(minor_thresholds=(2, 0.5)))
        axes.set_title(title)
        axes.grid(axis="y", which="both", color="#dddddd", linewidth=0.6)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        plt.close(drawing)


def _positions(curves: Mapping[str, Mapping[str, Figure]]) -> dict[str, int]:
    """Where each sparsity stands: shares from left to right, and N:M to the right of them."""
    found = {sparsity for figures in curves.values() for sparsity in figures} - {"0"}
    shares = sorted((s for s in found if ":" not in s), key=float)
    patterns = sorted((s for s in found if ":" in s), key=lambda s: (zeros(s), s))
    return {sparsity: i for i, sparsity in enumerate([*shares, *patterns])}


def _draw_dense(grid: Grid, axes: Any, figure: Figure, look: dict[str, Any]) -> None:
    """A model without zeros: a line through the whole width, and its standard error as a band."""
    scale, error = 1.0 if grid.lower_is_better else 100.0, figure.error or 0.0
    axes.axhline(scale * figure.mean, linestyle="--", linewidth=1.2, **look)
    low, high = scale * (figure.mean - error), scale * (figure.mean + error)
    axes.axhspan(low, high, color=look["color"], alpha=0.15, linewidth=0)


def _draw_method(
    grid: Grid, axes: Any, figures: Mapping[str, Figure], ticks: Mapping[str, int], aside: float, look: dict[str, Any]
) -> None:
    """A line through the shares; each N:M by itself."""
    scale = 1.0 if grid.lower_is_better else 100.0
    bars: dict[str, Any] = {"capsize": 2.5, "linewidth": 1.4, "markersize": 4.5, **look}
    shares = sorted((s for s in figures if ":" not in s and s in ticks), key=float)
    for i, part in enumerate(filter(None, [shares, *([s] for s in figures if ":" in s)])):
        means = [scale * figures[s].mean for s in part]
        errors = [scale * (figures[s].error or 0.0) for s in part]
        label = {} if i == 0 else {"label": "_"}
        axes.errorbar([ticks[s] + aside for s in part], means, yerr=errors, **{**bars, **label})
