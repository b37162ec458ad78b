"""Compressed sparse rows as in scipy and torch, with 2-byte column indices where they fit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pst_ds.formats.parts import FormatError, PackedFormat, Part
from pst_ds.formats.rows import columns_of, gather, row_counts, scatter_columns

MOST_COLUMNS = 1 << 31


class CsrFormat(PackedFormat):
    """``crow_indices`` (O + 1,), ``col_indices`` (nnz,), ``values`` (nnz,), ``shape`` (2,) int64.

    crow_indices are int32, or int64 from 2**31 values on; col_indices uint16, or int32 beyond 65,536 inputs.
    """

    name = "csr"
    part_names = ("crow_indices", "col_indices", "values", "shape")
    values_name = "values"

    def parts(self, shape: tuple[int, int], nonzero: int, dtype: torch.dtype) -> dict[str, Part]:
        rows, columns = shape
        if columns > MOST_COLUMNS:
            raise FormatError(f"csr holds at most {MOST_COLUMNS} inputs, got {columns}")
        return {
            "crow_indices": (torch.int32 if nonzero < 1 << 31 else torch.int64, (rows + 1,)),
            "col_indices": (torch.uint16 if columns <= 1 << 16 else torch.int32, (nonzero,)),
            "values": (dtype, (nonzero,)),
            "shape": (torch.int64, self.shape_dims),
        }

    def _unpack(self, parts: dict[str, Tensor], dtype: torch.dtype | None) -> Tensor:
        starts, columns = parts["crow_indices"].to(torch.int64), int(parts["shape"][1])
        dense = scatter_columns(parts["values"], starts, parts["col_indices"], columns)
        return dense if dtype is None else dense.to(dtype)

    def _pack(self, weight: Tensor, keep: Tensor, name: str) -> dict[str, Tensor]:
        columns = weight.shape[1]
        counts = row_counts(keep)
        count = int(counts.sum())
        try:
            expected = self.parts((weight.shape[0], columns), count, weight.dtype)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None
        starts = torch.zeros(expected["crow_indices"][1], dtype=expected["crow_indices"][0])
        starts[1:] = counts.cumsum(0)
        return {
            "crow_indices": starts,
            "col_indices": columns_of(keep, columns, count, expected["col_indices"][0]),
            "values": gather(weight, keep, count),
            "shape": self._shape_part(weight.shape),
        }

    def _check_contents(self, name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
        starts, indices = parts["crow_indices"].numpy(), parts["col_indices"].numpy()
        if starts[0] != 0 or starts[-1] != len(indices):
            raise FormatError(
                f"{name}: crow_indices must go from 0 to the number of values, {len(indices)}, but go from {starts[0]} "
                f"to {starts[-1]}"
            )
        falls = starts[1:] < starts[:-1]
        if falls.any():
            row = int(falls.argmax())
            raise FormatError(f"{name}: crow_indices decrease after row {row}, from {starts[row]} to {starts[row + 1]}")
        if not len(indices):
            return
        for column in (int(indices.min()), int(indices.max())):
            if not 0 <= column < shape[1]:
                raise FormatError(f"{name}: col_indices has column {column}, but the matrix has {shape[1]}")
        rises = indices[1:] > indices[:-1]
        first_of_row = starts[1:-1]
        rises[first_of_row[(first_of_row > 0) & (first_of_row < len(indices))] - 1] = True
        if not rises.all():
            at = int(np.argmin(rises))
            row = int(np.searchsorted(starts, at, side="right")) - 1
            raise FormatError(
                f"{name}: col_indices must increase within a row, but row {row} has {indices[at]} before "
                f"{indices[at + 1]}"
            )
