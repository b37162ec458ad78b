"""The description of one tensor of an export: name, shape, dtype, origin, packing and quantisation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from pst_ds.core.packings import COMPRESSED_TENSORS, DENSE
from pst_ds.core.quantization import Grid
from pst_ds.export.encoding import ExportError
from pst_ds.formats import VALUE_DTYPES, FormatError, PackedFormat, packed_format

Origin = Literal["base", "trained", "pruned", "model"]
""""base": unchanged pretrained values; "trained": from the checkpoint, or W0 + beta U V of an embedding; "pruned":
M . (W0 + beta U V); "model": from a model folder."""
ORIGINS: tuple[Origin, ...] = get_args(Origin)
MAX_DENSE_SHARE = 1.01
"""A weight is packed if its parts take at most this share of its dense bytes; csr at 50 % sparsity is just above 1."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of an export."""

    name: str
    shape: tuple[int, ...]
    """Shape in the model: (I, O) for a Conv1D; (E, O, I) or (E, I, O) for a stack of experts."""
    dtype: torch.dtype
    """Dtype in the model, also where quantised values are stored."""
    origin: Origin
    packing: str = DENSE
    """Packed format, or "dense"."""
    grid: Grid | None = None
    """Quantisation scheme; None for values in the model's dtype."""
    transposed: bool = False
    """Whether the model stores it as (I, O) or (E, I, O)."""
    is_linear: bool = False
    """Whether it is the weight of a linear layer, whose sparsity pattern is detected."""
    stored_values: int = 0
    """Values that the format of a packed tensor stores."""
    stays_dense: bool = False
    """Whether a sparse weight stays dense because the format cannot hold it, or would make it larger."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(O, I) of a linear layer's weight; (E*O, I) of a stack of experts."""
        *stacked, rows, columns = self.shape
        outputs, inputs = (columns, rows) if self.transposed else (rows, columns)
        return math.prod(stacked) * outputs, inputs

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the tensor in the model's dtype."""
        return self.numel * self.dtype.itemsize

    @property
    def form(self) -> PackedFormat | None:
        """Format of the parts; None for a tensor that is stored unchanged."""
        return None if self.packing == DENSE and self.grid is None else packed_format(self.packing, self.grid)

    def part_names(self) -> list[str]:
        """Return the names of its parts in the files, in the order of the format."""
        form = self.form
        return [self.name] if form is None else self._parts_named(form.part_names)

    def part_sizes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the dtype and shape of each part, by its name in the files. Raises ExportError."""
        if self.form is None:
            return {self.name: (self.dtype, self.shape)}
        try:
            sizes = self.form.parts(self.matrix, self.stored_values, self.dtype)
        except FormatError as error:
            raise ExportError(f"{self.name}: {error}") from None
        return dict(zip(self._parts_named(sizes), sizes.values(), strict=True))

    def _parts_named(self, parts: Iterable[str]) -> list[str]:
        module = self.name.removesuffix(".weight")
        return [f"{module}.{part}" for part in parts]

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all parts. Raises ExportError."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.part_sizes().values())

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, which has the model's shape, as :attr:`matrix`."""
        return (tensor.transpose(-1, -2) if self.transposed else tensor).flatten(0, -2)

    def as_in_model(self, matrix: Tensor) -> Tensor:
        """Return a view of ``matrix``, which has the shape :attr:`matrix`, in the model's shape."""
        *stacked, rows, columns = self.shape
        if self.transposed:
            return matrix.view(*stacked, columns, rows).transpose(-1, -2)
        return matrix.view(self.shape)

    def quantised(self, grid: Grid | None) -> TensorSpec:
        """Return the tensor quantised to ``grid``, or unchanged if it is not a matrix of floats."""
        can_be = self.dtype in VALUE_DTYPES and (len(self.shape) == 2 or self.is_linear) and self.dense_nbytes
        return replace(self, grid=grid) if can_be else self

    def for_compressed_tensors(self, packing: str) -> TensorSpec:
        """Return a quantised tensor in a layout of compressed-tensors. Raises ExportError for a Conv1D."""
        if self.grid is None:
            return self
        if self.transposed:
            raise ExportError(
                f"{self.name} is the weight of a Conv1D, and {COMPRESSED_TENSORS} supports nn.Linear only. Export "
                "with --format dense, and load with pst_ds.hf"
            )
        return replace(self, packing=packing)

    def packed(self, packing: str, counts: Tensor) -> TensorSpec:
        """Return the tensor packed, or dense if packing would make it larger.

        Args:
            packing: a packed format.
            counts: kept weights per row of the matrix, (O,) int64.
        """
        if self.dtype not in VALUE_DTYPES or not self.is_linear or not self.dense_nbytes:
            return self
        packed = replace(self, packing=packing, stored_values=packed_format(packing, self.grid).stored(counts))
        if packed.stored_nbytes > MAX_DENSE_SHARE * self.stored_nbytes:
            return replace(self, stays_dense=int(counts.sum()) < self.numel)
        return packed
