"""Draw the decoders' front: KL divergence against tokens per second and against size, with the best files joined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIGURE = Path("docs/decoders.svg")
OURS, OTHERS = "#0b6e4f", "#777777"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
"""Of the models, in the order of the rows."""


def draw(rows: Sequence[dict[str, Any]], corpus: str, path: Path) -> None:
    """Write the figure as SVG, byte for byte the same each time. The area of a marker is the file's size."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    points = [{**row, "kl": row["corpora"][corpus]["kl_mean"]} for row in rows if corpus in row["corpora"]]
    points = [point for point in points if point["kl"] > 0.0]
    markers = dict(zip(dict.fromkeys(point["model"] for point in points), MARKERS, strict=False))
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pst-ds", "font.size": 8}):
        figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.0), sharey=True, layout="constrained")
        for axes, key, sign in zip(panels, ("decode", "file_bytes"), (-1, 1), strict=True):
            scale = 1.0 if key == "decode" else 1e-6
            for point in points:
                color = OURS if point["engine"] == "pst-ds" else OTHERS
                at = (scale * point[key], point["kl"])
                area = point["file_bytes"] / 2e6
                axes.scatter(*at, s=area, color=color, marker=markers[point["model"]], alpha=0.8, linewidths=0)
                axes.annotate(point["file"], at, (4, 3), textcoords="offset points", color=color, fontsize=6)
            best = front([(sign * scale * point[key], point["kl"]) for point in points])
            axes.plot([sign * x for x, _ in best], [y for _, y in best], color=OTHERS, linewidth=0.8, zorder=0)
            axes.set_yscale("log")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2)
        panels[0].set(xlabel="tokens per second, one thread", ylabel=f"KL divergence on {corpus}, nats per token")
        panels[1].set(xlabel="file, MB")
        for model, marker in markers.items():
            panels[1].scatter([], [], marker=marker, color=OTHERS, label=model)
        panels[1].legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points of which no other is smaller in one coordinate and at most equal in the other, by the first."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found
