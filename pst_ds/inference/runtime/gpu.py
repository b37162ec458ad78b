"""Products with bitmask, 2:4 and dense weights, of codes or floats, on a GPU, without expanding the weight.

A few vectors use a kernel that walks along the kept values of each row (vector_kernels.py). More vectors use tiles that
are expanded on the chip for the tensor cores (tile_kernels.py). The experts of a stack share a launch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.kernels.triton.launch import blocks, launch, serves

MOST_WALKED = 8
"""Most vectors in a product that are processed by a walk each. After the first, the weight comes from the cache."""
MOST_TILED = 256
"""Most vectors for which expanding the weight on the chip is faster than once for a dense product. An estimate."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_CODES = {torch.int8: 8, torch.uint8: 4}
"""dtypes of codes, and their bits."""
_WORD = 32
_MOST_IN_TILE, _LEAST_IN_TILE = 64, 16


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Parts of a packed (O, I) weight that have passed their format's check, on one device."""

    values: Tensor
    """Kept values row by row, or codes: int8, or uint8 with two per byte, where rows start at byte boundaries."""
    bitmask: Tensor | None
    """(O, ceil(I / 8)) uint8; None if every position has a code."""
    row_offsets: Tensor
    """(O,) int64: index in ``values`` of the first element of every row."""
    scales: Tensor | None = None
    """(O, groups) bf16, for codes. A group has a multiple of 32 inputs, or all of them."""


def takes(x: Tensor, values: Tensor) -> bool:
    """Return whether kernels support the product of ``x`` (..., I) with a weight that has such ``values``."""
    return multiplies(x, values) and x.numel() // x.shape[-1] <= MOST_TILED


def multiplies(x: Tensor, values: Tensor) -> bool:
    """Return whether kernels multiply any number of vectors ``x`` (..., I) with such ``values``."""
    fits = values.dtype == x.dtype or values.dtype in _CODES
    return x.dtype in _FLOATS and fits and x.numel() > 0 and serves(x.device)


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Compute x W' + bias: (..., I) to (..., O) in the dtype of ``x``, with fp32 sums. Requires :func:`takes`.

    Up to :data:`MOST_WALKED` vectors are multiplied with codes, and sums of a group with its scale. For more vectors
    code * scale is rounded to the dtype of ``x`` first, as :func:`~pst_ds.core.quantization.dequantize` does.
    """
    rows, columns = weight.row_offsets.shape[0], x.shape[-1]
    flat = x.reshape(-1, columns)
    y = x.new_empty(len(flat), rows)
    (_walk if len(flat) <= MOST_WALKED else _tile)(flat, weight, bias, y)
    return y.view(*x.shape[:-1], rows)


def packed_experts(
    x: Tensor, weight: PackedWeight, experts: Tensor, runs: Iterable[tuple[int, slice]], y: Tensor
) -> list[tuple[int, slice]]:
    """Compute x W' with the expert of each vector, (P, I) to ``y`` (P, O), in one launch; see :func:`multiplies`.

    ``weight``: (E*O, I), of all experts. ``experts``: (P,), increasing. ``runs``: each expert that has vectors, and
    which. Walks if there are at most :data:`MOST_WALKED` vectors per tile. Returns the runs of more than
    :data:`MOST_TILED` vectors, for which nothing is written.
    """
    few: list[tuple[int, slice]] = []
    many: list[tuple[int, slice]] = []
    for expert, rows in runs:
        (few if rows.stop - rows.start <= MOST_TILED else many).append((expert, rows))
    in_tile = _in_tile(max((rows.stop - rows.start for _, rows in few), default=1))
    tiles = [
        (expert, first, min(in_tile, rows.stop - first))
        for expert, rows in few
        for first in range(rows.start, rows.stop, in_tile)
    ]
    if not many and len(x) <= MOST_WALKED * len(tiles):
        _walk(x, weight, None, y, experts)
    elif tiles:
        _tile(x, weight, None, y, torch.tensor(tiles, dtype=torch.int32, device=x.device), in_tile)
    return many


def _walk(x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor, experts: Tensor | None = None) -> None:
    from pst_ds.core.kernels.triton import vector_kernels as kernels

    (vectors, rows), columns = y.shape, x.shape[1]
    per_block = kernels.WARP * _WORD
    spread = x.new_zeros((vectors, blocks(columns, per_block) * per_block), dtype=torch.float32)
    spread[:, :columns] = x
    by_place = x.new_zeros((vectors, blocks(columns, per_block), kernels.X_ROWS, kernels.WARP), dtype=torch.float32)
    by_place[:, :, 1:] = spread.view(vectors, -1, kernels.WARP, _WORD).transpose(2, 3)
    launch(
        kernels.packed_vector, (rows, vectors), by_place, by_place.stride(0), experts, weight.values,
        weight.values.data_ptr() % 4, _bits(weight, columns), columns, weight.row_offsets, weight.scales, bias, y, rows,
        num_warps=1, fuse=True, UNROLL=kernels.UNROLL, **_grid_of(weight, columns),
    )  # fmt: skip


def _in_tile(vectors: int) -> int:
    """Return how many vectors fit in a tile for a product of ``vectors``."""
    return min(_MOST_IN_TILE, max(_LEAST_IN_TILE, 1 << (vectors - 1).bit_length()))


def _tile(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor, tiles: Tensor | None = None, in_tile: int = 0
) -> None:
    from pst_ds.core.kernels.triton import tile_kernels as kernels

    (vectors, rows), columns = y.shape, x.shape[1]
    in_tile = in_tile or _in_tile(vectors)
    count = blocks(vectors, in_tile) if tiles is None else len(tiles)
    launch(
        kernels.packed_tiles, (blocks(rows, kernels.TILE_ROWS), count), x.contiguous(), vectors, tiles, weight.values,
        _bits(weight, columns), rows, columns, weight.row_offsets, weight.scales, bias, y, fuse=True,
        ROWS=kernels.TILE_ROWS, VECTORS=in_tile, **_grid_of(weight, columns),
    )  # fmt: skip


def _bits(weight: PackedWeight, columns: int) -> Tensor | None:
    """Return the mask as words if every row has whole words, else as bytes."""
    bits = weight.bitmask
    if bits is None:
        return None
    bits = bits.contiguous()
    return bits.view(torch.int32) if columns % _WORD == 0 and bits.data_ptr() % 4 == 0 else bits


def _grid_of(weight: PackedWeight, columns: int) -> dict[str, int]:
    """Return bits per code (0 for floats), mask words per scale (0 for per-row scales) and scales per row."""
    groups = 1 if weight.scales is None else weight.scales.shape[1]
    words = 0 if groups == 1 else columns // groups // _WORD
    return {"BITS": _CODES.get(weight.values.dtype, 0), "GROUP_WORDS": words, "GROUPS": groups}
