"""Cut the backward pass of a layer into tiles, so that its buffers stay within a byte budget.

A tile has two buffers in the dtype of the weight, reused for the next tile:

    W    W0 + beta U V, later M . W
    G    dL/d(M . W)

The results of G are computed in bands of rows of the tile, small enough for a CPU's cache, in three more buffers:

    P    G . W, later G . M + G . |W| / scale
    Q    |W|
    M    the mask as integers for a bitwise AND

Unpacking M needs up to two more bytes per weight of the band (or two rows of the stored weight, if they are more). The
budget excludes tensors of the size of x or the factors (dX, its fp32 sum if it is one, the gradients of the factors in
fp32) and the scratch memory of the BLAS library (on CPUs with AMX, oneDNN packs copies of bf16 operands).
"""

from dataclasses import dataclass
from functools import cache

from pst_ds.core.layout import Rect, WeightLayout

DEFAULT_TILE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Bytes of a tile by device type, see docs/background/decisions.md."""
_BAND_ELEMENTS = {"cpu": 1 << 19}
"""Weights of a band, if a quarter of the budget allows them. On other devices that quarter is the only limit."""
MIN_STRIP = 32
"""Rows or columns of the thinnest tile. The products of a thinner strip would mostly copy x or dY."""
_WIDE_STRIP = 256
"""Least width of tiles with all outputs. Below it, tiles are cut along the outputs if that makes them twice as wide."""
_WIDEST_STRIP = {"cpu": 1024}
"""Wider tiles gain no speed on CPUs: dY' X with 5,504 inputs took 8.6 ns per weight for 1,024 of them, 9.6 for all."""
_ALIGNMENT = 64
"""Strips are multiples of this where possible, so that the mask of a tile starts at a byte boundary."""


class TileBudgetError(ValueError):
    """The byte budget is too small for any tile of a layer."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rectangles of the stored weight that cover it, for the backward pass of a layer."""

    rects: tuple[Rect, ...]
    cut_outputs: bool
    """True: a tile has some outputs and all inputs, and dX is a sum over tiles. False: it has all outputs."""

    band_elements: int
    """Weights per band of rows, at least one row of the tile."""

    @property
    def max_numel(self) -> int:
        return max(rect.numel for rect in self.rects)

    @property
    def max_band_numel(self) -> int:
        """Weights of the largest band. A tile may be smaller than a band, or have rows that are longer."""
        return max(min(rect.numel, max(self.band_elements, rect.c1 - rect.c0)) for rect in self.rects)


def tile_bytes_of(numel: int, band: int, itemsize: int) -> int:
    """Return the bytes for the backward pass of a tile of ``numel`` weights, ``band`` per band."""
    return 2 * itemsize * numel + (3 * itemsize + 2) * band


def least_tile_bytes(layout: WeightLayout, itemsize: int) -> int:
    """Return the smallest budget for which :func:`plan_tiles` accepts a layer."""
    short, long = sorted((layout.out_features, layout.in_features))
    return tile_bytes_of(short * min(long, MIN_STRIP), layout.shape[1], itemsize)


@cache
def plan_tiles(
    layout: WeightLayout, itemsize: int, tile_bytes: int = 0, *, device_type: str = "cpu", name: str = "layer"
) -> Tiles:
    """Cut a layer so that a tile needs at most ``tile_bytes``; 0 is the default for ``device_type``.

    Tiles have all outputs unless the layer has so many more outputs than inputs that they would be thin. Raises
    TileBudgetError, naming the layer, if no tile of MIN_STRIP rows or columns fits.
    """
    outputs = layout.out_features
    inputs = layout.in_features
    least = min(outputs, inputs) * min(max(outputs, inputs), MIN_STRIP)
    needed = least_tile_bytes(layout, itemsize)
    tile_bytes = tile_bytes or max(needed, DEFAULT_TILE_BYTES.get(device_type, DEFAULT_TILE_BYTES["cuda"]))
    if tile_bytes < needed:
        raise TileBudgetError(
            f"{name}: a tile of {tile_bytes} bytes is too small for its {outputs} x {inputs} weights of {itemsize} "
            f"bytes; set pst.tile_bytes to at least {needed}, or to 0 for the default"
        )
    # The band first, with at most a quarter of the budget; the tile gets the rest.
    quarter = tile_bytes // 4 // tile_bytes_of(0, 1, itemsize)
    band_elements = max(layout.shape[1], min(quarter, _BAND_ELEMENTS.get(device_type, quarter)))
    bytes_for_tile = tile_bytes - tile_bytes_of(0, band_elements, itemsize)
    fits = bytes_for_tile // tile_bytes_of(1, 0, itemsize)
    if fits < least:  # with a small budget the tile needs more than three quarters
        band_elements = layout.shape[1]
        fits = least
    input_strip = fits // outputs
    output_strip = fits // inputs
    too_thin = input_strip < min(inputs, MIN_STRIP)
    cut_outputs = too_thin or (input_strip < min(inputs, _WIDE_STRIP) and output_strip > 2 * input_strip)
    whole = inputs
    strip = input_strip
    if cut_outputs:
        whole = outputs
        strip = output_strip
    along_rows = cut_outputs != layout.transposed  # stored rows are outputs, or inputs if transposed
    height, width = layout.shape
    rects: list[Rect] = []
    for start, stop in _strips(whole, min(strip, _WIDEST_STRIP.get(device_type, strip))):
        if along_rows:
            rects.append(Rect(start, stop, 0, width))
        else:
            rects.append(Rect(0, height, start, stop))
    return Tiles(rects=tuple(rects), cut_outputs=cut_outputs, band_elements=band_elements)


def whole_tile(layout: WeightLayout) -> Tiles:
    """Return one tile with one band per matrix, for update forms that are not exact in slices. It has no budget."""
    height, width = layout.shape
    return Tiles((Rect(0, height, 0, width),), cut_outputs=False, band_elements=layout.numel)


def _strips(whole: int, strip: int) -> list[tuple[int, int]]:
    """Return the first and last + 1 of strips that cover ``whole`` rows or columns, each of at most ``strip``."""
    if strip >= whole:
        return [(0, whole)]
    step = -(-whole // -(-whole // strip))  # as few strips as possible, of nearly equal width
    # 8 bits of a mask are a byte.
    for alignment in (_ALIGNMENT, 8):
        aligned = -(-step // alignment) * alignment
        if aligned > strip:
            aligned = strip // alignment * alignment
        if aligned:
            step = aligned
            break
    return [(start, min(start + step, whole)) for start in range(0, whole, step)]
