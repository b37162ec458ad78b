"""Products of a few vectors with bitmask, 2:4 and dense weights, of codes or floats, on a GPU, from the packed parts.

The kernel walks along the kept values of each row, once per vector (vector_kernels.py). The experts of a stack share a
launch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.kernels.triton.launch import blocks, launch, serves

MOST_WALKED = 8
"""Most vectors in a product, or of an expert on average. After the first, the weight comes from the cache."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_CODES = {torch.int8: 8, torch.uint8: 4}
"""dtypes of codes, and their bits."""
_WORD = 32


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
    return multiplies(x, values) and x.numel() // x.shape[-1] <= MOST_WALKED


def multiplies(x: Tensor, values: Tensor) -> bool:
    """Return whether kernels multiply any number of vectors ``x`` (..., I) with such ``values``."""
    fits = values.dtype == x.dtype or values.dtype in _CODES
    return x.dtype in _FLOATS and fits and x.numel() > 0 and serves(x.device)


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Compute x W' + bias: (..., I) to (..., O) in the dtype of ``x``, with fp32 sums. Requires :func:`takes`.

    Vectors are multiplied with codes, and sums of a group with its scale.
    """
    rows = weight.row_offsets.shape[0]
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)  # (vectors, I)
    y = x.new_empty(len(flat), rows)
    packed_experts(flat, weight, experts=None, y=y, bias=bias)
    return y.view(*x.shape[:-1], rows)


def packed_experts(
    x: Tensor, weight: PackedWeight, experts: Tensor | None, y: Tensor, bias: Tensor | None = None
) -> None:
    """Compute x W' with the expert of each vector, (P, I) to ``y`` (P, O), in one launch; see :func:`multiplies`.

    ``weight``: (E*O, I), of all experts. ``experts``: (P,), increasing; None for an ordinary weight, with its ``bias``.
    """
    from pst_ds.core.kernels.triton import vector_kernels as kernels

    vectors, rows = y.shape
    columns = x.shape[1]
    # a step of a warp reads one word of 32 columns per lane; zeros fill the last step
    per_step = kernels.WARP * _WORD
    steps = blocks(columns, per_step)
    padded = x.new_zeros((vectors, steps * per_step), dtype=torch.float32)
    padded[:, :columns] = x
    # (vectors, steps, places in a word, lanes): lanes at the same place read neighbouring addresses. The first row
    # stays zero, for lanes whose word has no bits left
    by_place = x.new_zeros((vectors, steps, kernels.X_ROWS, kernels.WARP), dtype=torch.float32)
    by_place[:, :, 1:] = padded.view(vectors, steps, kernels.WARP, _WORD).transpose(2, 3)
    # the kernel loads codes as aligned words, so it takes the distance of the first code from such an address
    launch(
        kernels.packed_vector, (rows, vectors), by_place, by_place.stride(0), experts, weight.values,
        weight.values.data_ptr() % 4, _bits(weight, columns), columns, weight.row_offsets, weight.scales, bias, y, rows,
        num_warps=1, fuse=True, UNROLL=kernels.UNROLL, **_grid_of(weight, columns),
    )  # fmt: skip


def _bits(weight: PackedWeight, columns: int) -> Tensor | None:
    """Return the mask as words if every row has whole words, else as bytes."""
    bits = weight.bitmask
    if bits is None:
        return None
    bits = bits.contiguous()
    # a view, such as the rows of one expert, may start at any byte
    if columns % _WORD == 0 and bits.data_ptr() % 4 == 0:
        return bits.view(torch.int32)
    return bits


def _grid_of(weight: PackedWeight, columns: int) -> dict[str, int]:
    """Return bits per code (0 for floats), mask words per scale (0 for per-row scales) and scales per row."""
    groups = 1
    if weight.scales is not None:
        groups = weight.scales.shape[1]
    words = 0
    if groups > 1:
        words = columns // groups // _WORD
    return {"BITS": _CODES.get(weight.values.dtype, 0), "GROUP_WORDS": words, "GROUPS": groups}
