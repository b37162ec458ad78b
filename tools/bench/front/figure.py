"""Draw the fronts: decoders' KL divergence against speed and size, and classifiers' accuracy against latency.

Both are SVG files whose text stays text: they have half of the size, and browsers can search them. Drawing the same
rows twice gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

DECODERS = Path("docs/decoders.svg")
ENCODERS = Path("docs/accuracy.svg")
OURS = "#0b6e4f"
OPENVINO = "#b35806"
OTHERS = "#666666"
DENSE_MODELS = ("original", "fine-tuned", "dense", "GPTQ", "trained Q4_0")
"""Names of the models without sparsity in the rows of decoders."""
ENCODER_SHAPES = {"1x32": "1 x 32 tokens", "8x128": "8 x 128 tokens"}
"""Panels of the classifiers' figure: a single short request, and a batch."""
ENCODER_LABELS = {"FFN 50 %": "50 % of channels", "FFN 25 %": "25 % of channels"}
"""What the classifiers' figure calls a model, where its row has a shorter name."""
LABEL_OFFSETS = (
    (6, 0, "left", "center"),
    (-6, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (5, 7, "left", "bottom"),
    (5, -7, "left", "top"),
    (-5, 7, "right", "bottom"),
    (-5, -7, "right", "top"),
    (14, 14, "left", "bottom"),
    (14, -14, "left", "top"),
    (-14, 14, "right", "bottom"),
    (-14, -14, "right", "top"),
    (6, 24, "left", "bottom"),
    (-6, 24, "right", "bottom"),
    (6, -24, "left", "top"),
    (-6, -24, "right", "top"),
)
"""Places to try for a label: offset from its marker in points, then horizontal and vertical alignment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A marker with its label."""

    x: float
    y: float
    label: str
    color: str
    marker: str


def draw_decoders(rows: Sequence[dict[str, Any]], corpus: str, path: Path) -> None:
    """Write the decoders' figure: KL divergence on ``corpus`` against tokens per second and against file size."""
    measured = [row for row in rows if corpus in row["corpora"] and row["corpora"][corpus]["kl_mean"] > 0.0]
    with _figure(path, height=4.8) as (figure, (speed, size)):
        speed_points = [_decoder_point(row, row["decode"], corpus) for row in measured]
        size_points = [_decoder_point(row, row["file_bytes"] / 1e6, corpus) for row in measured]
        for axes in (speed, size):
            axes.set_yscale("log")
            axes.margins(0.12)
        _join(speed, front([(-point.x, point.y) for point in speed_points]), sign=-1)
        _join(size, front([(point.x, point.y) for point in size_points]), sign=1)
        _mark(speed, speed_points)
        _mark(size, size_points)
        speed.set(xlabel="tokens per second, one thread", ylabel=f"KL divergence on {corpus}, nats per token")
        size.set(xlabel="file, MB")
        _point_to_better(speed, x=0.98, y=0.03, text="better: faster, closer ↘", align="right")
        _point_to_better(size, x=0.02, y=0.03, text="↙ better: smaller, closer", align="left")
        for label, color, marker in (
            ("pst-ds, sparse", OURS, "o"),
            ("pst-ds, dense", OURS, "s"),
            ("llama.cpp", OTHERS, "s"),
        ):
            size.scatter([], [], color=color, marker=marker, label=label)
        figure.legend(*size.get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
        _label(figure, speed, speed_points)
        _label(figure, size, size_points)


def draw_encoders(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the classifiers' figure: accuracy against latency, with a line per engine.

    Bags of words and static embeddings are not drawn; the table of results has them.
    """
    with _figure(path, height=3.6) as (figure, panels):
        points_of_panels = []
        for axes, (shape, name) in zip(panels, ENCODER_SHAPES.items(), strict=True):
            points: list[Point] = []
            for engine, (title, color, marker) in _encoder_engines(rows).items():
                of_engine = [row for row in rows if row["engine"] == engine]
                of_engine.sort(key=lambda row: row["ms"][shape])
                engine_points = [
                    Point(
                        x=row["ms"][shape],
                        y=100 * row["accuracy"],
                        label=ENCODER_LABELS.get(row["model"], row["model"]),
                        color=color,
                        marker=marker,
                    )
                    for row in of_engine
                ]
                axes.plot([point.x for point in engine_points], [point.y for point in engine_points], color=color, lw=1)
                axes.scatter([], [], color=color, marker=marker, label=title)
                points += engine_points
            _mark(axes, points)
            axes.margins(0.14)
            axes.set_xlim(left=0)
            axes.set(xlabel=f"ms for {name}, one thread")
            _point_to_better(axes, x=0.02, y=0.96, text="↖ better: faster, more accurate", align="left")
            points_of_panels.append(points)
        figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
        for axes, points in zip(panels, points_of_panels, strict=True):
            _label(figure, axes, points)
        panels[0].set(ylabel="test accuracy, %")


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points of which no other is smaller in one coordinate and at most equal in the other, by the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


@contextmanager
def _figure(path: Path, *, height: float) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """Yield a figure of two panels that share the vertical axis, and write it to ``path`` afterwards."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pst-ds", "font.size": 9}):
        figure, panels = plt.subplots(1, 2, figsize=(10.0, height), sharey=True, layout="constrained")
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.2)
        yield figure, panels
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


def _decoder_point(row: dict[str, Any], x: float, corpus: str) -> Point:
    is_ours = row["engine"] == "pst-ds"
    is_sparse = row["model"] not in DENSE_MODELS
    if row["model"] in ("original", "fine-tuned", "dense"):
        label = row["file"]
    elif row["file"] in row["model"]:
        label = row["model"]
    else:
        label = f"{row['model']}, {row['file']}"
    return Point(
        x=x,
        y=row["corpora"][corpus]["kl_mean"],
        label=label,
        color=OURS if is_ours else OTHERS,
        marker="o" if is_sparse else "s",
    )


def _encoder_engines(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """Return the engines in ``rows`` with title, colour and marker; sparse files only with int8 activations."""
    engines = {
        "pst-ds int8, int8 activations": ("pst-ds operators in ONNX Runtime, int8", OURS, "o"),
        "OpenVINO int8": ("OpenVINO int8", OPENVINO, "s"),
        "ONNX Runtime int8": ("ONNX Runtime int8", OTHERS, "s"),
    }
    measured = {row["engine"] for row in rows}
    return {engine: style for engine, style in engines.items() if engine in measured}


def _join(axes: Axes, points: Sequence[tuple[float, float]], *, sign: int) -> None:
    """Draw the line through the best points. ``sign``: factor that restores the horizontal coordinates."""
    axes.plot([sign * x for x, _ in points], [y for _, y in points], color=OTHERS, linewidth=0.8, zorder=0)


def _mark(axes: Axes, points: Sequence[Point]) -> None:
    for point in points:
        axes.scatter(point.x, point.y, s=28, color=point.color, marker=point.marker, zorder=3)


def _point_to_better(axes: Axes, *, x: float, y: float, text: str, align: str) -> None:
    """Write which way is better, at fractions ``x`` and ``y`` of the panel."""
    axes.text(x, y, text, transform=axes.transAxes, ha=align, va="center", color=OTHERS, style="italic")


def _label(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Label the points; each label takes the first place that covers no marker, no other label and stays inside."""
    # Positions in pixels are known only after the layout is final.
    figure.canvas.draw()
    markers = [_around(*axes.transData.transform((point.x, point.y)), radius=5.0) for point in points]
    written = [text.get_window_extent() for text in axes.texts]
    for point in points:
        covered = [*markers, *written]
        candidates = []
        for across, up, horizontal, vertical in LABEL_OFFSETS:
            text = axes.annotate(
                point.label,
                (point.x, point.y),
                xytext=(across, up),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=point.color,
                fontsize=7,
            )
            extent = text.get_window_extent()
            overlaps = sum(extent.overlaps(other) for other in covered)
            outside = not (axes.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1)
            candidates.append((overlaps + 10 * outside, text, extent))
            if not overlaps and not outside:
                break
        best = min(range(len(candidates)), key=lambda index: candidates[index][0])
        for index, (_, text, extent) in enumerate(candidates):
            if index == best:
                written.append(extent)
            else:
                text.remove()


def _around(x: float, y: float, *, radius: float) -> Bbox:
    """Return the square around a marker, in pixels."""
    from matplotlib.transforms import Bbox

    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)
