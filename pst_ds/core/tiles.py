"""How the backward pass of a layer is cut, so that what it keeps beside its arguments stays within a byte budget.

A tile of h x w weights has four buffers in the dtype of the weight, used again for the next tile:

    W    W0 + beta U V, later |W|
    G    dL/d(M . W)
    P    G . W, then M . W, then G . M + G . |W| / scale
    M    the mask as integers to AND with

and while M is made up to two more bytes a weight (for which never less than two rows of the stored weight are
reckoned). Not in the budget: tensors as large as x or the factors (dX, its fp32 sum where it is one, the gradients of
the factors in fp32), and the scratch memory of the BLAS library.
"""

from __future__ import annotations

from dataclasses import dataclass

from pst_ds.core.layout import Rect, WeightLayout

DEFAULT_TILE_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Bytes of a tile by kind of device, see docs/design.md."""
MIN_BAND = 32
"""Rows or columns of the thinnest tile. A thinner one would spend most of its time copying x or dY for the product."""
_WIDE_BAND = 256
"""Tiles of all outputs are cut at least so wide, or else the other way where that makes them twice as wide."""
_WIDEST_BAND = {"cpu": 1024}
"""Wider tiles are no faster there: dY' X with 5,504 inputs took 8.6 ns a weight for 1,024 of them, 9.6 for all."""
_ALIGNMENT = 64
"""Bands are multiples of this where they can be, so that tiles of the mask begin with whole bytes."""


class TileBudgetError(ValueError):
    """The byte budget holds no useful tile of a layer."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """A layer's backward pass: rectangles of the stored weight that cover it."""

    rects: tuple[Rect, ...]
    cut_outputs: bool
    """True: a tile has some outputs and all inputs, and dX is a sum over tiles. False: it has all outputs (of every
    fused part), so that each tile writes its own columns of dX, once."""

    @property
    def max_numel(self) -> int:
        return max(rect.numel for rect in self.rects)


def tile_bytes_of(numel: int, row_length: int, itemsize: int) -> int:
    """Bytes alive in the backward pass of a tile of ``numel`` weights of ``itemsize`` bytes."""
    return numel * 4 * itemsize + 2 * max(numel, row_length)


def least_tile_bytes(layout: WeightLayout, itemsize: int) -> int:
    """The smallest budget that :func:`plan_tiles` takes for a layer."""
    short, long = sorted((layout.out_features, layout.in_features))
    return tile_bytes_of(short * min(long, MIN_BAND), layout.shape[1], itemsize)


def plan_tiles(
    layout: WeightLayout, itemsize: int, tile_bytes: int = 0, *, device_type: str = "cpu", name: str = "layer"
) -> Tiles:
    """Cut a layer so that a tile has at most ``tile_bytes``; 0 is the default for ``device_type``.

    Tiles have all outputs unless the layer has so many more outputs than inputs that they would be thin. Raises
    TileBudgetError, naming the layer, when no tile of MIN_BAND rows or columns fits.
    """
    outputs, inputs = layout.out_features, layout.in_features
    needed = least_tile_bytes(layout, itemsize)
    tile_bytes = tile_bytes or max(needed, DEFAULT_TILE_BYTES.get(device_type, DEFAULT_TILE_BYTES["cuda"]))
    if tile_bytes < needed:
        raise TileBudgetError(
            f"{name}: a tile of {tile_bytes} bytes is too small for its {outputs} x {inputs} weights of {itemsize} "
            f"bytes; set pst.tile_bytes to at least {needed}, or to 0 for the default"
        )
    fits = min((tile_bytes - 2 * layout.shape[1]) // (4 * itemsize), tile_bytes // (4 * itemsize + 2))
    input_band, output_band = fits // outputs, fits // inputs
    too_thin = input_band < min(inputs, MIN_BAND)
    cut_outputs = too_thin or (input_band < min(inputs, _WIDE_BAND) and output_band > 2 * input_band)
    whole, band = (outputs, output_band) if cut_outputs else (inputs, input_band)
    rects = []
    for start, stop in _bands(whole, min(band, _WIDEST_BAND.get(device_type, band))):
        along_rows = cut_outputs != layout.transposed
        height, width = layout.shape
        rects.append(Rect(start, stop, 0, width) if along_rows else Rect(0, height, start, stop))
    return Tiles(tuple(rects), cut_outputs)


def _bands(whole: int, band: int) -> list[tuple[int, int]]:
    """[0, whole) in bands of nearly equal size, none above ``band``."""
    if band >= whole:
        return [(0, whole)]
    step = -(-whole // -(-whole // band))
    for alignment in (_ALIGNMENT, 8):
        aligned = -(-step // alignment) * alignment
        if aligned > band:
            aligned = band // alignment * alignment
        if aligned:
            step = aligned
            break
    return [(start, min(start + step, whole)) for start in range(0, whole, step)]
