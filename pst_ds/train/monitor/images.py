"""Draw heat maps and histograms of a run, legible on light and dark pages.

Pixels are indices into :data:`PALETTE`, (height, width) uint8. Files are half as large as in full colour, and are
written several times faster.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

MOST_COLUMNS = 256
"""Maximum columns of a heat map."""
HISTOGRAM_WIDTH = 480
FLIP_DECADES = -5.0, -1.0
"""Powers of ten of the fraction of flipped weights at both ends of the colour scale."""
_HISTOGRAM_HEIGHT = 192
_COLOURS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=float)
"""Even steps of the viridis map from low to high; lightness increases throughout."""
_SHADES = 249
"""Colours of that map in the palette: an odd number, so that 0.5 has the middle colour."""
_CLEAR, _PRUNED, _KEPT, _AXIS, _LIGHT, _DARK = range(_SHADES, _SHADES + 6)
_THRESHOLD = _LIGHT, _DARK, _LIGHT
"""A dark line between two light ones, visible on every colour and on both pages."""


def flips_on_scale(flipped: np.ndarray) -> np.ndarray:
    """Map fractions of flipped weights to [0, 1], logarithmically between FLIP_DECADES."""
    low, high = FLIP_DECADES
    decades = np.log10(np.maximum(flipped, 10.0**low))
    return np.clip((decades - low) / (high - low), 0.0, 1.0)


def share_on_scale(share: Sequence[Sequence[float]]) -> np.ndarray:
    """Map fractions of kept weights to [0, 1], with 0.5 for their mean and 1 for twice the mean or more."""
    values = np.asarray(share, dtype=float)
    return np.clip(values / (2.0 * values.mean() or 1.0), 0.0, 1.0)


def histogram(kept: Sequence[int], pruned: Sequence[int], threshold: float | None) -> np.ndarray:
    """Draw stacked bars of pruned and kept weights per bin, without empty bins at both ends. ``threshold``: position of
    a vertical line, in bins from the left; None for no line."""
    counts = np.array([pruned, kept], dtype=float)
    filled = np.flatnonzero(counts.sum(0))
    first = int(filled[0]) if filled.size else 0
    counts = counts[:, first : filled[-1] + 1] if filled.size else counts
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


class MaskHistory:
    """Sparsity and flips of every layer at each mask update; neighbours are merged beyond MOST_COLUMNS columns."""

    def __init__(self, weights: Sequence[int]):
        self._weights = np.array(weights, dtype=float)
        self._columns: list[np.ndarray] = []
        self.merged = 1
        """Updates per column; the last column may have fewer."""
        self._in_last = 0

    def add(self, kept: Sequence[int], flipped: Sequence[int]) -> None:
        """Add an update, with the number of kept and of flipped weights of each layer."""
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
        """Return the sparsity after the last update of each column: (layers, columns)."""
        return np.stack([column[0] for column in self._columns], 1)

    def flips(self) -> np.ndarray:
        """Return the mean fraction of flipped weights per update of each column: (layers, columns)."""
        return np.stack([column[1] for column in self._columns], 1)


def shaded(values: np.ndarray) -> np.ndarray:
    """Return palette indices for values in [0, 1]."""
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
"""Colours of the pictures: (256, 4) uint8, RGBA."""


def png_of(pixels: np.ndarray, *, smallest: bool = False) -> bytes:
    """Return a picture as a PNG file; ``smallest`` takes several times longer."""
    from PIL import Image

    image, png = Image.fromarray(pixels), io.BytesIO()
    image.putpalette(PALETTE[:, :3].tobytes())
    image.save(png, format="PNG", compress_level=9 if smallest else 2, transparency=PALETTE[:, 3].tobytes())
    return png.getvalue()
