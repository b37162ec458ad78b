"""W0 + beta U V of bf16 weights on a CPU, and M . W, in one pass over the weight by compiled code (apply.cpp).

Sums are fp32, in the order of the components, and rounded once, so a weight is bit-identical in any rectangle. Without
a compiler, torch's product is used, which may sum in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pst_ds.core.factors import Constants, TileFactors
from pst_ds.core.kernels import merges
from pst_ds.core.kernels.triton.merge import MaskBytes
from pst_ds.core.layout import Rect

MOST_RANK = 16
"""Highest rank of an update for which this is faster than torch's product followed by a pass for the mask."""


def serves(weight: object, left: Tensor | None, right: Tensor | None, constants: Constants) -> bool:
    """Return whether :func:`merge_into` supports a layer, or a part, with this weight and these factors of its
    update."""
    if not isinstance(weight, Tensor) or left is None or right is None or constants.multiplicative:
        return False
    fits = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in (weight, left, right))
    return fits and left.shape[1] <= MOST_RANK and weight.stride(-1) == 1 and merges() is not None


def merge_into(
    out: Tensor, weight: Tensor, mask: MaskBytes | None, rect: Rect, tile: TileFactors, constants: Constants
) -> None:
    """Write M . (W0 + beta U V) of ``rect`` to ``out`` from ``weight``, (rows, cols) with contiguous rows.

    ``out`` may be ``weight``. Without a ``mask`` every weight is kept. Requires :func:`serves`.
    """
    native, left, right = merges(), tile.update_left, tile.update_right
    assert native is not None
    assert left is not None
    assert right is not None
    bits, row_bytes = (None, 0) if mask is None else (mask.bits[mask.first(rect) :], mask.row_bytes)
    strides = [torch.tensor(matrix.stride()) for matrix in (left, right)]
    native.pst_merge(
        weight, weight.stride(0), out, out.stride(0), *weight.shape, left, strides[0], right, strides[1],
        right.shape[0], constants.beta, bits, row_bytes, torch.get_num_threads(),
    )  # fmt: skip
