"""Kept values and one bit per position: the smallest format up to about 94 % sparsity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pst_ds.formats.parts import FormatError, PackedFormat, Part, checked_bits
from pst_ds.formats.rows import bytes_of_row, gather, row_counts, scatter


class BitmaskFormat(PackedFormat):
    """``compressed`` (nnz,), ``bitmask`` (O, ceil(I / 8)) uint8, ``row_offsets`` (O,) int64, ``shape`` (2,) int64."""

    name = "bitmask"
    part_names = ("compressed", "bitmask", "row_offsets", "shape")
    values_name = "compressed"

    def parts(self, shape: tuple[int, int], nonzero: int, dtype: torch.dtype) -> dict[str, Part]:
        rows, columns = shape
        return {
            "compressed": (dtype, (nonzero,)),
            "bitmask": (torch.uint8, (rows, bytes_of_row(columns))),
            "row_offsets": (torch.int64, (rows,)),
            "shape": (torch.int64, self.shape_dims),
        }

    def _unpack(self, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        dense = scatter(parts["compressed"], parts["bitmask"], int(parts["shape"][1]))
        return dense if dtype is None else dense.to(dtype)

    def _pack(self, weight: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        counts = row_counts(keep)
        return {
            "compressed": gather(weight, keep, int(counts.sum())),
            "bitmask": keep,
            "row_offsets": counts.cumsum(0) - counts,
            "shape": self._shape_part(weight.shape),
        }

    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        checked_bits(name, parts["bitmask"], shape[1])
        counts = row_counts(parts["bitmask"])
        total, values = int(counts.sum()), parts["compressed"].numel()
        if total != values:
            raise FormatError(f"{name}: bitmask keeps {total} positions, and compressed has {values} values")
        wrong = parts["row_offsets"] != counts.cumsum(0) - counts
        if wrong.any():
            row = int(wrong.to(torch.uint8).argmax())
            found, right = int(parts["row_offsets"][row]), int(counts[:row].sum())
            raise FormatError(f"{name}: row_offsets of row {row} is {found}, and the bitmask makes it {right}")
