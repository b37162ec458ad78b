"""A quantised table of frozen rows, an embedding or an output layer: row look-up and products.

Codes are expanded for the requested rows, or for a slice of rows at a time, so the whole table exists only as codes.
All functions take a :class:`CodedWeight` of one shard, (rows, width), whose rows start at byte boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from pst_ds.core.quantization.coded import CodedWeight
from pst_ds.core.quantization.nibbles import unpack_nibbles
from pst_ds.core.quantization.stored import scales_of_bytes

_EXPANDED_AT_A_TIME = {"cpu": 1 << 20}
"""Weights per slice, which stays in a CPU's caches; 2**24 on other devices."""


def table_rows(table: CodedWeight, numbers: Tensor) -> Tensor:
    """Return rows by their ``numbers``, (...,) int64, like an embedding: (..., width)."""
    stored, flat = table.layout.stored, numbers.reshape(-1)
    height, width = stored.layout.shape
    packed = embedding(flat, table.codes.view(height, -1))
    codes = unpack_nibbles(packed, width) if stored.grid.bits == 4 else packed.view(torch.int8)
    scales = embedding(flat, scales_of_bytes(table.scales, stored.shape)).float()
    out = torch.empty(len(flat), width, dtype=table.dtype, device=table.device)
    by_group = (-1, stored.size)
    torch.mul(codes.unflatten(1, by_group), scales.unsqueeze(2), out=out.unflatten(1, by_group))
    return out.view(*numbers.shape, width)


def times_table(x: Tensor, table: CodedWeight, bias: Tensor | None = None) -> Tensor:
    """Return x T' + bias, (n, width) to (n, rows), like ``linear`` with the whole table T."""
    out = x.new_empty(len(x), table.shape[0])
    for rows in _slices(table):
        out[:, rows] = linear(x, table[rows].dense(), None if bias is None else bias[rows])
    return out


def of_table_inputs(grad_y: Tensor, table: CodedWeight) -> Tensor:
    """Return the gradient of x, (n, width), from the gradient of x T', (n, rows): products of slices, summed in
    fp32.
    """
    slices = list(_slices(table))
    if len(slices) == 1:
        return grad_y @ table.dense()
    total = torch.zeros(len(grad_y), table.shape[1], dtype=torch.float32, device=grad_y.device)
    for rows in slices:
        total += grad_y[:, rows] @ table[rows].dense()
    return total.to(grad_y.dtype)


def slice_numel(rows: int, width: int, device_type: str) -> int:
    """Return the weights per slice of a table that are expanded in one step."""
    return width * min(rows, max(1, _EXPANDED_AT_A_TIME.get(device_type, 1 << 24) // width))


def _slices(table: CodedWeight) -> Iterator[slice]:
    height, width = table.shape
    step = slice_numel(height, width, table.device.type) // width
    return (slice(first, min(first + step, height)) for first in range(0, height, step))
