"""Draw the histograms of a run, legible on light and dark pages.

Pixels are indices into :data:`PALETTE`, (height, width) uint8. Files are half as large as in full colour, and are
written several times faster.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

HISTOGRAM_WIDTH = 480
_HISTOGRAM_HEIGHT = 192
_CLEAR, _PRUNED, _KEPT, _AXIS, _LIGHT, _DARK = range(6)
_THRESHOLD = _LIGHT, _DARK, _LIGHT
"""A dark line between two light ones, visible on every colour and on both pages."""
PALETTE = np.zeros((6, 4), np.uint8)
"""Colours of the pictures, RGBA."""
PALETTE[_PRUNED], PALETTE[_KEPT], PALETTE[_AXIS] = (224, 130, 40, 255), (60, 130, 220, 255), (128, 128, 128, 255)
PALETTE[_LIGHT], PALETTE[_DARK] = (255, 255, 255, 255), (0, 0, 0, 255)


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


def png_of(pixels: np.ndarray) -> bytes:
    """Return a picture as a PNG file."""
    from PIL import Image

    image, png = Image.fromarray(pixels), io.BytesIO()
    image.putpalette(PALETTE[:, :3].tobytes())
    image.save(png, format="PNG", compress_level=2, transparency=PALETTE[:, 3].tobytes())
    return png.getvalue()
