"""The plan of an export, made before the first value: tensors, their packing, and their places in files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pst_ds.core.packings import COMPRESSED_TENSORS
from pst_ds.core.quantization import Grid
from pst_ds.export.encoding import Encoding
from pst_ds.export.manifest import DENSE, ExportError
from pst_ds.formats import VALUE_DTYPES, FormatError, PackedFormat, packed_format
from pst_ds.formats.safetensors_file import Slot, header_and_slots

SHARD_BYTES = 5 << 30
MOST_OF_DENSE = 1.01
"""A weight is packed when its parts take at most this share of its dense bytes: csr of half zeros is just above 1."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of an export."""

    name: str
    shape: tuple[int, ...]
    """As the model has it: (I, O) for a Conv1D; (E, O, I) or (E, I, O) for a stack of experts."""
    dtype: torch.dtype
    origin: str
    """See :class:`pst_ds.export.manifest.TensorEntry`."""
    packing: str = DENSE
    """A format, or "dense"."""
    grid: Grid | None = None
    """What its values are rounded to; None leaves them as they are."""
    stored: int = 0
    """The number of positions that a packed tensor keeps, as its format counts them."""
    transposed: bool = False
    """True where it is stored (I, O), or (E, I, O)."""
    is_linear: bool = False
    """True for the weight of a linear layer, which is searched for patterns."""
    stays_dense: bool = False
    """True where it has zeros and was to be packed, but the format cannot hold it, or would make it larger."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(O, I) of a linear layer's weight; (E*O, I) of a stack of experts."""
        *stacked, rows, columns = self.shape
        outputs, inputs = (columns, rows) if self.transposed else (rows, columns)
        return math.prod(stacked) * outputs, inputs

    @property
    def nbytes(self) -> int:
        """The bytes of the dense tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def form(self) -> PackedFormat | None:
        """The format of its parts; None where it is stored as it is."""
        return None if self.packing == DENSE and self.grid is None else packed_format(self.packing, self.grid)

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of what is written for it, by the name in the file. Raises ExportError."""
        if self.form is None:
            return {self.name: (self.dtype, self.shape)}
        try:
            sizes = self.form.parts(self.matrix, self.stored, self.dtype)
        except FormatError as error:
            raise ExportError(f"{self.name}: {error}") from None
        return {f"{self.name.removesuffix('.weight')}.{part}": size for part, size in sizes.items()}

    @property
    def stored_nbytes(self) -> int:
        """The bytes of all that is written for it. Raises ExportError."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.parts().values())

    def rounded(self, grid: Grid | None) -> PlannedTensor:
        """Return the tensor with its values on ``grid``, if it is a matrix of numbers that can be."""
        can_be = self.dtype in VALUE_DTYPES and (len(self.shape) == 2 or self.is_linear) and self.nbytes
        return replace(self, grid=grid) if can_be else self

    def for_compressed_tensors(self, packing: str) -> PlannedTensor:
        """Return the tensor in that layout of the library, if it is on a grid. Raises ExportError for a Conv1D."""
        if self.grid is None:
            return self
        if self.transposed:
            raise ExportError(
                f"{self.name} is the weight of a Conv1D, and {COMPRESSED_TENSORS} knows nn.Linear alone; export with "
                "--format dense, and load with pst_ds.hf"
            )
        return replace(self, packing=packing)

    def packed(self, packing: str, counts: Tensor) -> PlannedTensor:
        """Return the tensor packed, if that is not larger than with every position stored; else it stays dense.

        ``counts``: kept positions of each row of the matrix, (O,) int64.
        """
        if self.dtype not in VALUE_DTYPES or not self.is_linear or not self.nbytes:
            return self
        packed = replace(self, packing=packing, stored=packed_format(packing, self.grid).stored(counts))
        if packed.stored_nbytes > MOST_OF_DENSE * self.stored_nbytes:
            return replace(self, stays_dense=int(counts.sum()) < math.prod(self.shape))
        return packed


@dataclass(frozen=True, slots=True)
class TensorValues:
    """The values of a planned tensor."""

    tensor: Tensor
    """In the model's shape; where ``keep`` is given, values that are not kept may be anything."""
    keep: Tensor | None = None
    """Row bits (O, ceil(I/8)) of the mask that the tensor was pruned by."""
    pruned_per_matrix: tuple[int, ...] = ()
    scales: Tensor | None = None
    """(O, groups) bf16 of a tensor that is on its grid already."""
    rounding_error: float = 0.0
    """What an earlier rounding to the grid changed."""


@dataclass(frozen=True, slots=True)
class TensorJob:
    """Tensors that are made together: one, but where transformers makes several of one of its own."""

    outputs: tuple[PlannedTensor, ...]
    recipe: Any
    """The source's own description of them; it can be sent to another process."""
    in_parent: bool = False
    """True where making them takes the model, which other processes do not have."""


class Source(Protocol):
    """Where an export's values come from. It is sent to every process that writes."""

    def make(self, job: TensorJob) -> Iterator[TensorValues]:
        """The values of the job's outputs, in their order. Raises ExportError."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One weight file."""

    name: str
    header: bytes
    slots: dict[str, Slot]
    nbytes: int


def plan_files(jobs: Sequence[TensorJob], stem: str, shard_bytes: int) -> list[PlannedFile]:
    """The files that hold all outputs, in their order; a tensor's parts are in one file. Names begin with ``stem``.

    A file holds at most ``shard_bytes`` of tensors, unless a single one has more.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for output in (output for job in jobs for output in job.outputs):
        parts = output.parts()
        nbytes = output.stored_nbytes
        if shards[-1] and filled + nbytes > shard_bytes:
            shards, filled = [*shards, {}], 0
        twice = next((name for name in parts for shard in shards if name in shard), None)
        if twice:
            raise ExportError(f"two tensors of the model would be named {twice} in the export")
        shards[-1] |= parts
        filled += nbytes
    count = len(shards)
    ends = [f"-{i + 1:05d}-of-{count:05d}" for i in range(count)] if count > 1 else [""]
    return [PlannedFile(f"{stem}{e}.safetensors", *header_and_slots(s)) for e, s in zip(ends, shards, strict=True)]


def require_space(folder: Path, nbytes: int) -> None:
    """Raise ExportError when the disk of ``folder``, which need not be there yet, has not ``nbytes`` free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise ExportError(f"{folder} needs {nbytes:,} bytes, and the disk has {free:,} free; name another with --out")


def require_packed(jobs: Sequence[TensorJob], encoding: Encoding) -> list[str]:
    """Names of the linear layers' sparse weights that stay dense.

    Raises ExportError when nothing is packed, or rounded, that was to be.
    """
    outputs, packing = [output for job in jobs for output in job.outputs], encoding.packing
    if encoding.is_quantized and not any(output.grid for output in outputs):
        raise ExportError(
            "no weight can be rounded: --values is for linear layers inside the blocks, and --embeddings for embedding "
            "tables and output layers, and this model has none"
        )
    if packing == DENSE or any(output.packing != DENSE for output in outputs):
        return [output.name for output in outputs if output.stays_dense]
    if packing == "2:4":
        raise ExportError(
            "no weight is 2:4 (at most two non-zeros in every four consecutive inputs), so nothing can be packed; "
            'train with pst.pattern = "2:4" (final sparsity 0.5), or export with --format bitmask'
        )
    raise ExportError(
        f"no weight would be smaller as {packing} than it is dense, so nothing can be packed; bitmask needs more than "
        "7 % zeros in a weight and csr more than half. Export with --format dense"
    )
