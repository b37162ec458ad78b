"""Units of a pattern (blocks, N:M groups, rows): their tiles, keys and masks, and their expansion to weights."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pst_ds.core.keys import native_for, order_keys, scores_of_keys
from pst_ds.core.layout import Rect, shard_tiles


def unit_tiles(
    matrix: Rect, unit: tuple[int, int], row_length: int, start: int, stop: int, size: int
) -> Iterator[Rect]:
    """Yield the part of ``matrix`` in the flat range [start, stop) as rectangles of whole units, in increasing order.

    The range must be aligned (:meth:`Pattern.aligned`). A rectangle has about ``size`` weights, at least one unit.
    """
    rows, cols = unit
    if rows == 1:
        yield from shard_tiles(matrix, row_length, start, stop, size)
        return
    first = max(start // row_length, matrix.r0)
    last = min(stop // row_length, matrix.r1)
    width = matrix.c1 - matrix.c0
    bands = max(1, size // (rows * width))  # rows of units in a rectangle, if one fits
    across = max(1, size // (rows * cols)) * cols
    for r0 in range(first, last, bands * rows):
        r1 = min(r0 + bands * rows, last)
        if rows * width <= size:
            yield Rect(r0, r1, matrix.c0, matrix.c1)
            continue
        for c0 in range(matrix.c0, matrix.c1, across):
            yield Rect(r0, r1, c0, min(c0 + across, matrix.c1))


def block_keys(keys: Tensor, unit: tuple[int, int]) -> Tensor:
    """Return the keys of the summed scores of the blocks in a rectangle's ``keys`` (rows, cols): (blocks,) int32."""
    return order_keys(_sum_of_units(scores_of_keys(keys), unit)).flatten()


def loss_keys(keys: Tensor, unit: tuple[int, int], prune: int) -> Tensor:
    """Return the keys of N:M groups: of the sum of the ``prune`` scores that each would lose, (groups,) int32."""
    kept = keep_n_of_m(keys, unit, prune)
    return order_keys(_sum_of_units(scores_of_keys(keys).masked_fill_(kept.bool(), 0.0), unit)).flatten()


def expand_units(kept: Tensor, rect: Rect, unit: tuple[int, int]) -> Tensor:
    """Expand the mask of the units of ``rect``, (units,) uint8, to the mask of its weights, (rows, cols)."""
    by_unit = kept.view((rect.r1 - rect.r0) // unit[0], (rect.c1 - rect.c0) // unit[1])
    return by_unit.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)


def keep_n_of_m(keys: Tensor, unit: tuple[int, int], prune: int) -> Tensor:
    """Return the uint8 mask (rows, cols) without the ``prune`` smallest keys of every unit, (1, M) or (M, 1).

    Of equal keys, the first are pruned.
    """
    size = max(unit)
    stride = 1  # distance in memory of two keys of a unit
    if unit[0] > 1:
        stride = keys.shape[1]
    native = native_for(keys)
    if native is not None:
        keys = keys.contiguous()
        keep = torch.empty(keys.shape, dtype=torch.uint8)
        groups = keys.numel() // (size * stride)
        native.pst_keep_n_of_m(keys, groups, size, stride, prune, keep)
        return keep
    grouped = keys.reshape(-1, size, stride)
    # The inverse of the permutation that sorts is the place of each key in its group; a stable sort puts the first of
    # equal keys first.
    places = grouped.sort(dim=1, stable=True).indices.argsort(dim=1)
    return (places >= prune).to(torch.uint8).view(keys.shape)


def keep_in_rows(keys: Tensor, unit: tuple[int, int], prune: int) -> Tensor:
    """Return the uint8 mask (rows, cols) without the ``prune`` smallest keys of every unit, a whole row or column.

    Of equal keys, the first are pruned.
    """
    is_column = unit[0] > 1
    along = keys
    if is_column:
        along = keys.t()
    along = along.contiguous()
    native = native_for(keys)
    if native is not None:
        keep = torch.empty(along.shape, dtype=torch.uint8)
        native.pst_keep_in_rows(along, *along.shape, prune, keep)
    else:
        pruned = along.sort(dim=1, stable=True).indices[:, :prune]
        keep = torch.ones_like(along, dtype=torch.uint8).scatter_(1, pruned, 0)
    if is_column:
        return keep.t()
    return keep


def _sum_of_units(scores: Tensor, unit: tuple[int, int]) -> Tensor:
    """Return the sums over units, (unit rows, unit cols), by pairwise halving: bit-identical in any tile."""
    rows, cols = unit
    units = scores.view(scores.shape[0] // rows, rows, scores.shape[1] // cols, cols)
    return _fold(_fold(units, 3), 1).view(units.shape[0], units.shape[2])


def _fold(values: Tensor, dim: int) -> Tensor:
    """Add the second half of ``dim`` to the first until one value is left. A last value without a partner waits."""
    # Not sum(): the order in which that adds depends on the shape and the device.
    while (size := values.shape[dim]) > 1:
        half = size // 2
        folded = values.narrow(dim, 0, half) + values.narrow(dim, half, half)
        if size % 2:
            folded = torch.cat([folded, values.narrow(dim, size - 1, 1)], dim)
        values = folded
    return values
