"""Launch the kernels for a layer's merged weight and for the backward pass of a band of G."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.factors import Constants, TileFactors
from pst_ds.core.kernels.triton.launch import blocks, launch, serves
from pst_ds.core.layout import Rect

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class MaskBytes:
    """A mask in which every row of the stored weight, and every shard, starts at a byte boundary."""

    bits: Tensor
    row_bytes: int

    def holds(self, rect: Rect) -> bool:
        return rect.c0 % 8 == 0

    def first(self, rect: Rect) -> int:
        """Return the first byte of a rectangle."""
        return rect.r0 * self.row_bytes + rect.c0 // 8


def mask_rows(bits: Tensor, shape: tuple[int, int], shard_numel: int) -> MaskBytes | None:
    """Return the mask of a stored weight of ``shape``, or None if its rows or shards start within a byte."""
    return MaskBytes(bits, shape[1] // 8) if shape[1] % 8 == 0 and shard_numel % 8 == 0 else None


def mask_bytes(weight: object, bits: Tensor, shape: tuple[int, int], shard_numel: int) -> MaskBytes | None:
    """Return the mask as the kernels take it, or None if they do not support a layer with this weight."""
    if not isinstance(weight, Tensor) or weight.dtype not in _DTYPES or not serves(weight.device):
        return None
    return mask_rows(bits, shape, shard_numel)


def merge_into(
    out: Tensor, weight: Tensor, mask: MaskBytes, rect: Rect, tile: TileFactors, constants: Constants
) -> None:
    """Write M . (W0 + beta U V) of ``rect`` to ``out`` from ``weight``, (rows, cols) with contiguous rows."""
    from pst_ds.core.kernels.triton import merge_kernels as kernels

    grid = blocks(out.shape[0], kernels.TILE_ROWS), blocks(out.shape[1], kernels.TILE_COLS)
    arguments, shapes = _merged(weight, mask, rect, tile, constants)
    shapes |= {"ROWS": kernels.TILE_ROWS, "COLS": kernels.TILE_COLS}
    launch(kernels.merge, grid, *arguments, out, out.stride(0), fuse=True, **shapes)


def gradients_into(
    merged: Tensor,
    scores: Tensor | None,
    updates: Tensor | None,
    weight: Tensor,
    grad: Tensor,
    mask: MaskBytes,
    rect: Rect,
    tile: TileFactors,
    constants: Constants,
    factor: float,
) -> None:
    """Write M . W to ``merged``, G . W to ``scores`` and G . M + ``factor`` G . |W| . 1 n' to ``updates``.

    All are (rows, cols) of ``rect`` with contiguous rows. Without ``factor``, |W| has no gradient.
    """
    from pst_ds.core.kernels.triton import merge_kernels as kernels

    grid = blocks(grad.shape[0], kernels.GRADIENT_ROWS), blocks(grad.shape[1], kernels.GRADIENT_COLS)
    arguments, shapes = _merged(weight, mask, rect, tile, constants)
    norms = [n if n is None else n.float().contiguous() for n in (tile.row_norms, tile.col_norms)]
    outputs = (part for out in (merged, scores, updates) for part in (out, 0 if out is None else out.stride(0)))
    shapes |= {"ROWS": kernels.GRADIENT_ROWS, "COLS": kernels.GRADIENT_COLS, "HAS_MAGNITUDE": factor != 0.0}
    launch(kernels.gradients, grid, *arguments, grad, grad.stride(0), *norms, factor, *outputs, fuse=True, **shapes)


def _merged(
    weight: Tensor, mask: MaskBytes, rect: Rect, tile: TileFactors, constants: Constants
) -> tuple[list[object], dict[str, int]]:
    """Return the kernels' arguments for the merged weight, and their constants."""
    from pst_ds.core.kernels.triton import merge_kernels as kernels

    left, right = tile.update_left, tile.update_right
    arguments: list[object] = [weight, weight.stride(0), *weight.shape, mask.bits, mask.row_bytes, mask.first(rect)]
    if left is None or right is None:
        return [*arguments, None, 0, 0, None, 0, 0, 0.0, 0], {"RANK": 0}
    rank = right.shape[0]
    padded = max(kernels.LEAST_RANK, 1 << (rank - 1).bit_length())
    arguments += [left, *left.stride(), right, *right.stride(), constants.beta, rank]
    return arguments, {"RANK": padded}
