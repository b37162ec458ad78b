"""The curves of runs as charts: SVG images that matplotlib draws."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pst_ds.errors import InputError
from pst_ds.report.run_data import RunData
from pst_ds.train.monitor.curves import EVALUATION

CHARTS = {
    "Loss": "loss",
    "Sparsity": "sparsity/",
    "Flip rate": "flip_rate",
    "Correlation of S with |W|": "correlation",
    "Evaluation: {}": EVALUATION,
    "Learning rates": "lr/",
    "Tokens per second": "tokens_per_second",
    "Seconds per step without waiting": "ranks/",
}
"""Title and curve of every chart. All curves with a prefix share one chart, or have one each if the title has {}."""
_LOGARITHMIC = ("flip_rate", "lr/")
_RANKS = ("ranks/most_seconds", "ranks/median_seconds")
_MOST_MARKS = 20
"""Most points of a line that has visible marks."""
STYLES = ("-", "―"), ("--", "╌"), (":", "┈"), ("-.", "·―")
"""Styles of a run's lines, with samples for the legend."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing without any text from the data."""

    title: str
    svg: str
    legend: list[tuple[str, str]]
    """Colour in HTML, and text with the last value, of every line."""

    @property
    def uri(self) -> str:
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode('ascii')}"


def charts(runs: Sequence[RunData]) -> Iterator[Chart]:
    """Yield each chart for which a run has a curve. Raises InputError without matplotlib."""
    known = list(dict.fromkeys(name for run in runs for name in run.curves))
    for title, curve in CHARTS.items():
        names = [name for name in known if name == curve or (curve.endswith("/") and name.startswith(curve))]
        names = [name for name in names if curve != "ranks/" or name in _RANKS]
        for chosen in [[name] for name in names] if "{}" in title else filter(None, [names]):
            yield _drawn(title.format(chosen[0].removeprefix(curve)), runs, chosen, curve in _LOGARITHMIC)


def _drawn(title: str, runs: Sequence[RunData], names: Sequence[str], is_logarithmic: bool) -> Chart:
    """Draw the curves ``names`` of all runs over their steps."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pst-ds report draws with matplotlib. Install it: pip install 'pst-ds[plots]'") from None
    lines = [
        (i, j, run.curves[name]) for i, run in enumerate(runs) for j, name in enumerate(names) if name in run.curves
    ]
    is_one, legend, image = len(runs) == 1, [], io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pst-ds", "axes.formatter.useoffset": False}):
        axes = (figure := Figure(figsize=(4, 2.2), layout="constrained")).subplots()
        for i, j, points in lines:
            colour, (style, sample) = f"C{j if is_one else i}", STYLES[0 if is_one else j % len(STYLES)]
            marker = "." if len(points) <= _MOST_MARKS else ""
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, linestyle=style)
            parts = [sample, "" if is_one else runs[i].name, names[j].partition("/")[2] if len(names) > 1 else ""]
            legend.append((mpl.colors.to_hex(colour), " ".join(filter(None, [*parts, f"{points[-1][1]:.4g}"]))))
        if is_logarithmic and any(value > 0 for *_, points in lines for _, value in points):
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.tick_params(labelsize=8)
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Chart(title, image.getvalue(), legend)
