"""Draw the README's figure: accuracy against latency and file size of MiniLM classifiers, ours and the alternatives.

``python -m tools.docs.figure`` reads tools/docs/encoders.csv and writes docs/accuracy.svg. The times are from
``python -m tools.bench.peers --no-decoders --json``; sizes and accuracy are from it and from ``make demo``.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).with_name("encoders.csv")
FIGURE = ROOT / "docs" / "accuracy.svg"
MAGNITUDE = 77.17
"""Accuracy in percent after one-shot magnitude pruning to 90 % and full fine-tuning under the mask."""
OURS, OTHERS = "#0b6e4f", "#777777"
SIDES = {
    "left": (-7, 0, "right"), "right": (7, 0, "left"), "above": (0, 9, "center"), "below": (0, -11, "center"),
}  # fmt: skip
"""Offset of a label from its marker in points, and its horizontal alignment."""


def draw(path: Path) -> None:
    """Write the figure as SVG, byte for byte the same each time.

    Text stays text instead of outlines: the file has half of the size, and browsers can search it.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    with DATA.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pst-ds", "font.size": 9}):
        figure, (time, size) = plt.subplots(1, 2, figsize=(9.6, 3.4), sharey=True, layout="constrained")
        for axes, column in ((time, "ms"), (size, "megabytes")):
            for row in rows:
                if row[column]:
                    _mark(axes, float(row[column]), row, row[f"{column}_label"])
            axes.axhline(MAGNITUDE, color=OTHERS, linewidth=1, linestyle=":")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2)
        time.set(xlim=(0, 11), ylim=(76.5, 84.7), ylabel="test accuracy, %", xlabel="ms for 128 tokens, one thread")
        size.set(xlim=(0, 30), xlabel="weight file, MB")
        time.text(0.2, MAGNITUDE + 0.12, "magnitude pruning, 90 %", color=OTHERS)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _mark(axes: Axes, x: float, row: dict[str, str], side: str) -> None:
    ours, accuracy = row["ours"] == "yes", float(row["accuracy"])
    across, up, align = SIDES[side]
    color = OURS if ours else OTHERS
    axes.plot(x, accuracy, "o" if ours else "s", color=color, markersize=6)
    at, offset = (x, accuracy), (across, up)
    axes.annotate(row["label"], at, offset, textcoords="offset points", ha=align, va="center", color=color)


if __name__ == "__main__":
    draw(FIGURE)
