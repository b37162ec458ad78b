"""Heat maps of layers by steps, thumbnails of masks and histograms of scores, as they stand in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pst_ds.monitor.images import FLIP_DECADES, coloured, filled_bins, flips_on_scale, share_on_scale
from pst_ds.report.axes import BOTTOM, LEFT, RIGHT, TOP, Axis, Tick, axis_of, short, whole
from pst_ds.report.layer_data import LayerData, Picture
from pst_ds.report.run_data import RunData
from pst_ds.report.thin import spread

MOST_SNAPSHOTS = 4
"""Of a layer's scores, or of its mask."""


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Layers from top to bottom, mask updates from left to right, a pixel a cell."""

    title: str
    note: str
    png: str
    """A data URI."""
    scale: tuple[str, str]
    """What the lowest and the highest colour stand for."""
    step_ticks: list[Tick]
    layers: list[str]
    steps: list[str]
    """Of each column."""
    values: str
    """Of every cell, row by row: little-endian float32 in base64."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin: the pruned at the bottom, the kept on top of them."""

    x: float
    width: float
    pruned_y: float
    pruned_height: float
    kept_y: float
    kept_height: float


@dataclass(frozen=True, slots=True)
class Histogram:
    step: int
    bars: list[Bar]
    score_ticks: list[Tick]
    threshold: float | None
    """Place of the line where the mask would be cut."""
    about: str


@dataclass(frozen=True, slots=True)
class Thumbnail:
    step: int
    png: str
    rows: int
    columns: int
    about: str


@dataclass(frozen=True, slots=True)
class LayerPictures:
    layer: str
    histograms: list[Histogram]
    thumbnails: list[Thumbnail]


def heat_maps(run: RunData) -> Iterator[HeatMap]:
    """Of sparsity and of flips, if the run has updated its masks."""
    layers = run.layers
    if layers is None or not layers.update_steps:
        return
    sparsity, flips = layers.history.sparsity(), layers.history.flips()
    low, high = FLIP_DECADES
    yield _heat_map(layers, "Sparsity", "share of zeros", sparsity, sparsity, ("0", "1"))
    scale = (f"{10**low:.3%} or less", f"{10**high:.0%} or more")
    note = "of mask bits, log scale"
    yield _heat_map(layers, "Flips", note, flips, flips_on_scale(flips), scale)


def _heat_map(
    layers: LayerData, title: str, note: str, values: np.ndarray, on_scale: np.ndarray, scale: tuple[str, str]
) -> HeatMap:
    columns = layers.column_steps()
    count = len(columns)
    shown = sorted({0, count // 2, count - 1})
    ticks = [Tick(round(LEFT + (i + 0.5) / count * (RIGHT - LEFT), 1), short(columns[i][0])) for i in shown]
    texts = [whole(first) if first == last else f"{first:,} to {last:,}" for first, last in columns]
    packed = base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
    return HeatMap(title, note, png_uri(coloured(on_scale)), scale, ticks, layers.names, texts, packed)


def png_uri(pixels: np.ndarray) -> str:
    """``pixels``: (height, width, 4) uint8."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(png, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode('ascii')}"


def layer_pictures(run: RunData) -> Iterator[LayerPictures]:
    """Of every layer that was chosen for pictures, in model order."""
    layers = run.layers
    if layers is None:
        return
    for i in sorted({*layers.histograms, *layers.thumbnails}):
        histograms = [_histogram(line) for line in spread(layers.histograms.get(i, []), MOST_SNAPSHOTS)]
        thumbnails = [_thumbnail(line) for line in spread(layers.thumbnails.get(i, []), MOST_SNAPSHOTS)]
        yield LayerPictures(layers.names[i], histograms, thumbnails)


def _histogram(line: Picture) -> Histogram:
    """Empty bins at both ends are left out."""
    counts = np.array([line["pruned"], line["kept"]], dtype=float)
    width = (line["high"] - line["low"]) / counts.shape[1]
    first, last = filled_bins(counts)
    scores = axis_of(line["low"] + first * width, line["low"] + last * width, LEFT, RIGHT)
    heights = Axis(0.0, max(1.0, counts.sum(0).max()), BOTTOM, TOP)
    bars = [
        _bar(scores.place(line["low"] + i * width), scores.place(line["low"] + (i + 1) * width), counts[:, i], heights)
        for i in range(first, last)
    ]
    cut, kept_share = line["threshold"], counts[1].sum() / max(1.0, counts.sum())
    about = f"{kept_share:.1%} kept" + (f", cut at {short(cut)}" if cut is not None else "")
    place = None if cut is None else round(min(max(scores.place(cut), LEFT), RIGHT), 1)
    return Histogram(line["step"], bars, scores.ticks(4), place, about)


def _bar(left: float, right: float, counts: np.ndarray, heights: Axis) -> Bar:
    pruned, top = heights.place(counts[0]), heights.place(counts.sum())
    edges = (left, right - left - 0.5, pruned, BOTTOM - pruned, top, pruned - top)
    return Bar(*(round(float(edge), 1) for edge in edges))


def _thumbnail(line: Picture) -> Thumbnail:
    share = np.array(line["share"], dtype=float)
    rows, columns = share.shape
    about = f"cells keep {share.min():.1%} to {share.max():.1%}"
    return Thumbnail(line["step"], png_uri(coloured(share_on_scale(line["share"]))), rows, columns, about)
