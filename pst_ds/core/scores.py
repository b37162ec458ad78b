"""Importance scores and merged weights, each formula once (arXiv 2205.11005, equations 4 to 8)."""

import math

import torch
from torch import Tensor

from pst_ds.core.bits import apply_range_
from pst_ds.core.coded_weight import CodedWeight, weights_at
from pst_ds.core.factors import Constants, Factors, TileFactors, tile_factors
from pst_ds.core.kernels import merges
from pst_ds.core.kernels.triton.merge import MaskBits, kernel_mask, mask_bits, merge_layer
from pst_ds.core.layout import Rect, WeightLayout, row_tiles
from pst_ds.core.quantization import Rounding

MASK_BAND_ELEMENTS = {"cpu": 1 << 19}
"""Weights whose mask is unpacked in one step when a whole matrix is merged; 2**24 on other devices."""
MOST_RANK = 16
"""Highest rank of an update for which :func:`merge_natively` is faster than torch's product and a pass for the mask."""


def mask_band_elements(device_type: str) -> int:
    """Return the weights whose mask is unpacked in one step."""
    return MASK_BAND_ELEMENTS.get(device_type, 1 << 24)


def add_low_rank_(out: Tensor, left: Tensor | None, right: Tensor | None, scale: float, scratch: Tensor) -> None:
    """Add scale * left @ right to ``out``, one component after another, with separate rounding of product and sum.

    A BLAS product rounds by the shape of the slice, and a fused multiply-add by where a vector loop ends: neither gives
    the same score for the same weight at every world size.
    """
    if left is None or right is None:
        return
    scaled = left
    if scale != 1.0:
        scaled = left * scale
    for k in range(right.shape[0]):
        torch.mul(scaled[:, k : k + 1], right[k], out=scratch)
        out.add_(scratch)


def importance(
    weight: Tensor, tile: TileFactors, constants: Constants, weight_scale: float = 1.0, factors: Tensor | None = None
) -> Tensor:
    """Return S = |W0 + beta U V| . 1 n' / weight_scale + alpha1 A B + alpha2 (R 1' + 1 C') of one rectangle.

    ``weight``: W0, (rows, cols), any float dtype. ``factors``: (rows, 1) fp32 multipliers of |W|, in place of 1 /
    weight_scale. S omits the update if ``constants.frozen_magnitude``. Returns fp32 (rows, cols),
    bit-identical for a given weight regardless of the rectangle.
    """
    if constants.frozen_magnitude:
        scores = weight.to(torch.float32, copy=True)  # a copy, which is changed in place
    else:
        scores = sliced_weight(weight, tile, constants)
    scratch = torch.empty_like(scores)
    scores.abs_()
    # Products, not quotients: torch divides by a number differently on CPUs and on CUDA.
    if factors is not None:
        scores.mul_(factors)
    elif weight_scale != 1.0:
        scores.mul_(1.0 / weight_scale)
    if tile.row_norms is not None:
        scores.mul_(tile.row_norms.unsqueeze(1))
    if tile.col_norms is not None:
        scores.mul_(tile.col_norms)
    add_learned_scores_(scores, tile, constants, scratch)
    return scores


def add_learned_scores_(scores: Tensor, tile: TileFactors, constants: Constants, scratch: Tensor | None = None) -> None:
    """Add alpha1 A B + alpha2 (R 1' + 1 C') to fp32 ``scores``, bit-identical for a given weight in any rectangle.

    ``scratch``: a tensor like ``scores`` whose values may be overwritten.
    """
    # Terms are added to the scores one by one, as kernels do: adding their sum would round differently.
    if scratch is None:
        scratch = torch.empty_like(scores)
    add_low_rank_(scores, tile.score_left, tile.score_right, constants.alpha1, scratch)
    if tile.score_rows is not None:
        scores.add_((tile.score_rows * constants.alpha2).unsqueeze(1))
    if tile.score_cols is not None:
        scores.add_(tile.score_cols * constants.alpha2)


def sliced_weight(weight: Tensor, tile: TileFactors, constants: Constants) -> Tensor:
    """Return W0 + beta U V of one rectangle: fp32 (rows, cols).

    Bit-identical regardless of the rectangle, which :func:`updated_weight` is not; of a form without kernels only if
    that is exact in slices.
    """
    if tile.update is not None:
        return tile.update.applied(weight.to(torch.float32), constants).contiguous()
    updated = weight.to(torch.float32, copy=True)
    add_low_rank_(updated, tile.update_left, tile.update_right, constants.beta, torch.empty_like(updated))
    return updated


def merges_natively(weight: object, left: Tensor | None, right: Tensor | None) -> bool:
    """Return whether :func:`merge_natively` supports a weight, or a part of it, and the factors of its update."""
    if not isinstance(weight, Tensor) or left is None or right is None:
        return False
    fits = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in (weight, left, right))
    return fits and left.shape[1] <= MOST_RANK and weight.stride(-1) == 1 and merges() is not None


def merge_natively(
    out: Tensor, weight: Tensor, mask: MaskBits | None, rect: Rect, tile: TileFactors, constants: Constants
) -> None:
    """Write M . (W0 + beta U V) of ``rect`` to ``out`` from ``weight``, (rows, cols) with contiguous rows, in one pass.

    Sums are fp32, in the order of the components, and rounded once: bit-identical in any rectangle, while torch may sum
    in another order. ``out`` may be ``weight``. Without a ``mask`` every weight is kept.
    """
    native = merges()
    left = tile.update_left
    right = tile.update_right
    assert native is not None
    assert left is not None
    assert right is not None
    bits = None
    row_bytes = 0
    if mask is not None:
        # Rows of the rectangle start at byte boundaries: see MaskBits.holds.
        bits = mask.bits[(rect.r0 * mask.width + rect.c0) // 8 :]
        row_bytes = mask.width // 8
    # Strides, so that the transposed views of a Conv1D's factors need no copy.
    left_strides = torch.tensor(left.stride())
    right_strides = torch.tensor(right.stride())
    native.pst_merge(
        weight, weight.stride(0), out, out.stride(0), *weight.shape, left, left_strides, right, right_strides,
        right.shape[0], constants.beta, bits, row_bytes, torch.get_num_threads(),
    )  # fmt: skip


def updated_weight(weight: Tensor, tile: TileFactors, constants: Constants, out: Tensor | None = None) -> Tensor:
    """Return W = W0 + beta U V of one rectangle in the dtype of ``weight``, written to ``out`` if given.

    ``out`` may be ``weight`` itself.
    """
    if tile.update is not None:
        updated = tile.update.applied(weight, constants)
        if out is None:
            return updated.to(weight.dtype)
        return out.copy_(updated)
    if tile.update_left is None or tile.update_right is None:
        if out is None:
            return weight.clone()
        return out.copy_(weight)
    in_rows = out is None or out.stride(-1) == 1
    if in_rows and merges_natively(weight, tile.update_left, tile.update_right):
        if out is None:
            out = torch.empty_like(weight)
        merge_natively(out, weight, None, Rect(0, weight.shape[0], 0, weight.shape[1]), tile, constants)
        return out
    return torch.addmm(weight, tile.update_left, tile.update_right, alpha=constants.beta, out=out)


def merged_weight(weight: Tensor | CodedWeight, layout: WeightLayout, factors: Factors, constants: Constants) -> Tensor:
    """Return W0 + beta U V of a whole layer, in storage shape and in the dtype of ``weight``: a new, contiguous tensor.

    Bit-identical to :func:`masked_weight` where the mask keeps a weight, except if a GPU kernel computed that.
    """
    merged = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for matrix in layout.matrices():
        rect = matrix.rect
        out = merged[rect.slices]
        tile = tile_factors(factors, layout, matrix, rect)
        updated_weight(weights_at(weight, rect, out), tile, constants, out)
    return merged


def masked_weight(
    weight: Tensor | CodedWeight,
    bits: Tensor,
    num_shards: int,
    layout: WeightLayout,
    factors: Factors,
    constants: Constants,
    rounding: Rounding | None = None,
) -> Tensor:
    """Return M . (W0 + beta U V) in storage shape and in the dtype of ``weight``. Pruned entries are +0.0.

    Forward pass, evaluation and export call this with the same values, so an export contains exactly the weights that
    the model multiplied with. ``bits``: the whole mask, (num_shards * ceil(shard / 8),) uint8. ``rounding``:
    quantisation of the result.
    """
    height, width = layout.shape
    whole = Rect(0, height, 0, width)
    mask = None
    if not factors.update:  # kernels compute the update U V only
        mask = kernel_mask(weight, bits, layout.shape, num_shards)
    if mask is not None:
        assert isinstance(weight, Tensor)
        merged = merge_layer(weight, mask, layout, factors, constants)
    elif mask := _native_mask(weight, bits, num_shards, layout, factors):
        assert isinstance(weight, Tensor)
        merged = torch.empty_like(weight)
        for matrix in layout.matrices():
            rect = matrix.rect
            tile = tile_factors(factors, layout, matrix, rect)
            merge_natively(merged[rect.slices], weight[rect.slices], mask, rect, tile, constants)
    else:
        merged = merged_weight(weight, layout, factors, constants)
        # In bands of rows, so that an unpacked mask, a byte per weight, is never as large as the layer.
        for band in row_tiles(whole, mask_band_elements(weight.device.type)):
            apply_range_(merged[band.r0 : band.r1], bits, layout.numel, num_shards, band.r0 * width)
            if rounding is not None:
                rounding.round_(merged[band.r0 : band.r1], band)
        return merged
    if rounding is not None:
        rounding.round_(merged, whole)
    return merged


def _native_mask(
    weight: Tensor | CodedWeight, bits: Tensor, num_shards: int, layout: WeightLayout, factors: Factors
) -> MaskBits | None:
    """Return the mask for :func:`merge_natively`, or None if that does not support the layer."""
    mask = mask_bits(bits, layout.shape, num_shards)
    rows_at_bytes = all(mask.holds(matrix.rect) for matrix in layout.matrices())
    if not rows_at_bytes or not merges_natively(weight, factors.U, factors.V):
        return None
    return mask


def abs_sum_fixed_point(weight: Tensor, exponent: int) -> Tensor:
    """Return the sum of |w| * 2**exponent, each term rounded to an integer: 0-d int64, the same in any order.

    With ``exponent`` from :func:`fixed_point_exponent` a term is at most 2**30, so 2**33 terms cannot overflow.
    """
    return weight.double().abs().mul_(2.0**exponent).round_().to(torch.int64).sum()


def fixed_point_exponent(largest: float) -> int:
    """Return the power of two that brings the largest |w| of a matrix to at most 2**30."""
    if largest <= 0.0:
        return 0
    _, exponent = math.frexp(largest)  # largest < 2**exponent
    return 30 - exponent
