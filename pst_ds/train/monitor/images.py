"""Pictures of a run as arrays of pixels, legible on a light and on a dark page. Pixels are numbers of colours in
:data:`PALETTE`, (height, width) uint8: files are half as large as in full colour, and made several times faster."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

MOST_COLUMNS = 256
"""Most columns of a heat map; merge more before."""
MAP_SIZE, THUMBNAIL_SIZE, HISTOGRAM_WIDTH = 512, 256, 480
FLIP_DECADES = -5.0, -1.0
"""Powers of ten between which the colour of a share of flipped weights runs."""
_MOST_CELL_PIXELS = 24
_HISTOGRAM_HEIGHT = 192
_GAP, _SCALE_WIDTH = 8, 12
_COLOURS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=float)
"""From low to high: even steps of the viridis map, which gets lighter all the way."""
_SHADES = 249
"""Of that map, from which one value in two hundred does not differ; the middle one is its middle colour."""
_CLEAR, _PRUNED, _KEPT, _AXIS, _LIGHT, _DARK = range(_SHADES, _SHADES + 6)
_THRESHOLD = _LIGHT, _DARK, _LIGHT
"""A dark line between two light ones: it shows on every colour, and on both pages."""


def heat_map(values: np.ndarray, size: int = MAP_SIZE) -> np.ndarray:
    """Cells of ``values``, (rows, columns) in [0, 1], row 0 on top; to their right the colour scale from 1 to 0. About
    ``size`` pixels wide, and high: cells are of whole pixels, at least one wide and two high."""
    down = max(2, min(_MOST_CELL_PIXELS, size // values.shape[0]))
    across = max(1, min(_MOST_CELL_PIXELS, size // values.shape[1]))
    cells = shaded(values).repeat(down, 0).repeat(across, 1)
    scale = shaded(np.linspace(1.0, 0.0, len(cells))[:, None].repeat(_SCALE_WIDTH, 1))
    return np.hstack([cells, np.full((len(cells), _GAP), _CLEAR, np.uint8), scale])


def flips_on_scale(flipped: np.ndarray) -> np.ndarray:
    """Shares of flipped weights as values in [0, 1] for :func:`heat_map`, logarithmic between FLIP_DECADES."""
    low, high = FLIP_DECADES
    decades = np.log10(np.maximum(flipped, 10.0**low))
    return np.clip((decades - low) / (high - low), 0.0, 1.0)


def thumbnail(share: Sequence[Sequence[float]]) -> np.ndarray:
    """Cells of a mask, coloured by the share of weights they keep, from 0 to twice the mean, and the scale of colours.
    The colour is relative to the mean: at 90 % sparsity, all cells of a large matrix keep about a tenth."""
    return heat_map(share_on_scale(share), THUMBNAIL_SIZE)


def share_on_scale(share: Sequence[Sequence[float]]) -> np.ndarray:
    """Shares of kept weights as values in [0, 1] for :func:`heat_map`, 0.5 for their mean."""
    values = np.asarray(share, dtype=float)
    return np.clip(values / (2.0 * values.mean() or 1.0), 0.0, 1.0)


def histogram(kept: Sequence[int], pruned: Sequence[int], threshold: float | None) -> np.ndarray:
    """Bars of the pruned with the kept on top of them, and a line at ``threshold``, in bins from the left; empty bins
    at both ends are left out."""
    counts = np.array([pruned, kept], dtype=float)
    first, last = filled_bins(counts)
    counts = counts[:, first:last]
    heights = np.rint(counts.cumsum(0) / max(1.0, counts.sum(0).max()) * (_HISTOGRAM_HEIGHT - 2)).astype(int)
    width = max(4, HISTOGRAM_WIDTH // counts.shape[1])
    picture = np.full((_HISTOGRAM_HEIGHT, counts.shape[1] * width), _CLEAR, np.uint8)
    floor = _HISTOGRAM_HEIGHT - 2
    for i, (low, high) in enumerate(heights.T):
        bar = slice(i * width, (i + 1) * width - 1)
        picture[floor - high : floor - low, bar] = _KEPT
        picture[floor - low : floor, bar] = _PRUNED
    picture[floor:] = _AXIS
    if threshold is not None:
        at = min(max(1, round((threshold - first) * width)), picture.shape[1] - 2)
        picture[:, at - 1 : at + 2] = _THRESHOLD
    return picture


def filled_bins(counts: np.ndarray) -> tuple[int, int]:
    """The first and last + 1 of the bins of ``counts``, (rows, bins), that are not empty; all if all are."""
    filled = np.flatnonzero(counts.sum(0))
    return (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, counts.shape[1])


class MaskHistory:
    """Sparsity and flips of every layer at the mask updates so far; neighbours are merged once there are too many."""

    def __init__(self, weights: Sequence[int]):
        self._weights = np.array(weights, dtype=float)
        self._columns: list[np.ndarray] = []
        self.merged = 1
        """Updates that a column stands for; the last column may have fewer."""
        self._in_last = 0

    def add(self, kept: Sequence[int], flipped: Sequence[int]) -> None:
        """One update more: weights kept and flipped of each layer."""
        new = np.stack([1.0 - np.array(kept) / self._weights, np.array(flipped) / self._weights])
        if self._columns and self._in_last < self.merged:
            self._in_last += 1
            flips = self._columns[-1][1] + (new[1] - self._columns[-1][1]) / self._in_last
            self._columns[-1] = np.stack([new[0], flips])
            return
        if len(self._columns) == MOST_COLUMNS:
            pairs = zip(self._columns[::2], self._columns[1::2], strict=True)
            self._columns = [np.stack([b[0], (a[1] + b[1]) / 2.0]) for a, b in pairs]
            self.merged *= 2
        self._columns.append(new)
        self._in_last = 1

    def sparsity(self) -> np.ndarray:
        """Return the sparsity after the last update of each column, (layers, columns)."""
        return np.stack([column[0] for column in self._columns], 1)

    def flips(self) -> np.ndarray:
        """Return the mean share of flipped weights per update of each column, (layers, columns)."""
        return np.stack([column[1] for column in self._columns], 1)


def shaded(values: np.ndarray) -> np.ndarray:
    """Numbers of the colours in the palette of values in [0, 1]."""
    return np.rint(np.asarray(values, dtype=float) * (_SHADES - 1)).astype(np.uint8)


def _palette() -> np.ndarray:
    places = np.linspace(0.0, 1.0, len(_COLOURS))
    shades = [np.interp(np.linspace(0.0, 1.0, _SHADES), places, channel) for channel in _COLOURS.T]
    found = np.zeros((256, 4), np.uint8)
    found[:_SHADES] = np.stack([*shades, np.full(_SHADES, 255.0)], -1)
    found[_PRUNED], found[_KEPT], found[_AXIS] = (224, 130, 40, 255), (60, 130, 220, 255), (128, 128, 128, 255)
    found[_LIGHT], found[_DARK] = (255, 255, 255, 255), (0, 0, 0, 255)
    return found


PALETTE = _palette()
"""The colours of pictures, (256, 4) uint8: red, green, blue and how solid each is."""


def png_of(pixels: np.ndarray, *, smallest: bool = False) -> bytes:
    """Return a picture as a file, which ``smallest`` takes several times longer for."""
    from PIL import Image

    image, png = Image.fromarray(pixels), io.BytesIO()
    image.putpalette(PALETTE[:, :3].tobytes())
    image.save(png, format="PNG", compress_level=9 if smallest else 2, transparency=PALETTE[:, 3].tobytes())
    return png.getvalue()
