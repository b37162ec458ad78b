"""The plan of an export: its tensors, which of them are made together, and where they go in the weight files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from pst_ds.core.packings import DENSE
from pst_ds.core.quantization import Grid
from pst_ds.formats import VALUE_DTYPES, FormatError, PackedFormat, stored_bits
from pst_ds.formats.rows import row_counts
from pst_ds.formats.safetensors_file import Slot, header_and_slots
from pst_ds.storage_format import StorageFormat, packed_format, storage_format
from pst_ds.writing.encoding import Encoding, ExportError

SHARD_BYTES = 5 << 30
"""Default size limit of a weight file."""

Origin = Literal["base", "trained", "pruned", "model"]
""""base": unchanged pretrained values; "trained": from the checkpoint, or W0 + beta U V of an embedding; "pruned":
M . (W0 + beta U V); "model": from a model folder."""
_MAX_DENSE_SHARE = 1.01
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
    """Storage format that marks its tensors, or "dense"."""
    grid: Grid | None = None
    """Quantisation scheme; None for values in the model's dtype."""
    transposed: bool = False
    """True if the model stores it as (I, O) or (E, I, O)."""
    is_linear: bool = False
    """True for the weight of a linear layer, whose sparsity pattern is detected."""
    stored_values: int = 0
    """Values that the format of a packed tensor stores."""
    bitmask_shape: tuple[int, ...] = ()
    """Shape of its bitmask in the file; () for other formats than bitmask."""
    stays_dense: bool = False
    """True if a sparse weight stays dense because the format cannot hold it, or would make it larger."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(O, I) of a linear layer's weight; (E*O, I) of a stack of experts."""
        *stacked, rows, columns = self.shape
        if self.transposed:
            rows, columns = columns, rows
        return math.prod(stacked) * rows, columns

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the tensor in the model's dtype."""
        return self.numel * self.dtype.itemsize

    @property
    def is_of_floats(self) -> bool:
        """True if packed and quantised layouts can hold its dtype."""
        return self.dtype in VALUE_DTYPES

    @property
    def storage(self) -> StorageFormat:
        return storage_format(self.packing)

    @property
    def is_packed(self) -> bool:
        """True if a format other than "dense" lays out its parts."""
        return self.storage.marks_tensors

    @property
    def form(self) -> PackedFormat | None:
        """Layout of the parts; None for a tensor that is stored unchanged. Raises ValueError for an impossible one."""
        if self.is_packed:
            return packed_format(self.packing, self.grid)
        return self.storage.layout(self.grid)

    def part_names(self, parts: Iterable[str] = ()) -> list[str]:
        """Return the names in the files of its ``parts``, by default all of them in the order of the format."""
        if self.form is None:
            return [self.name]
        module = self.name.removesuffix(".weight")
        return [f"{module}.{part}" for part in parts or self.form.part_names]

    def part_sizes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the dtype and shape of each part, by its name in the files. Raises ExportError."""
        if self.form is None:
            return {self.name: (self.dtype, self.shape)}
        try:
            sizes = self.form.parts(self.matrix, self.stored_values, self.dtype)
        except FormatError as error:
            raise ExportError(f"{self.name}: {error}") from None
        if self.bitmask_shape:
            # compressed, to a size that only its bits determine
            sizes["bitmask"] = torch.uint8, self.bitmask_shape
        return dict(zip(self.part_names(sizes), sizes.values(), strict=True))

    @property
    def stored_nbytes(self) -> int:
        """Bytes of all parts. Raises ExportError."""
        nbytes = 0
        for dtype, shape in self.part_sizes().values():
            nbytes += math.prod(shape) * dtype.itemsize
        return nbytes

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, which has the model's shape, as :attr:`matrix`."""
        if self.transposed:
            tensor = tensor.transpose(-1, -2)  # (..., outputs, inputs)
        return tensor.flatten(0, -2)

    def as_in_model(self, matrix: Tensor) -> Tensor:
        """Return a view of ``matrix``, which has the shape :attr:`matrix`, in the model's shape."""
        *stacked, rows, columns = self.shape
        if self.transposed:
            return matrix.view(*stacked, columns, rows).transpose(-1, -2)
        return matrix.view(self.shape)

    def quantised(self, grid: Grid | None) -> TensorSpec:
        """Return the tensor quantised to ``grid``, or unchanged if it is not a matrix of floats."""
        # a stack of experts has three dimensions, and is quantised as the matrix of all its rows
        is_matrix = len(self.shape) == 2 or self.is_linear
        if self.is_of_floats and is_matrix and self.numel:
            return replace(self, grid=grid)
        return self

    def stored_as(
        self, encoding: Encoding, grid: Grid | None, keep: Callable[[TensorSpec], Tensor] | None = None
    ) -> TensorSpec:
        """Return the tensor as an export stores it.

        Args:
            encoding: storage of the export.
            grid: quantisation of the tensor if it is not packed.
            keep: reads the row bits of the kept weights, (O, ceil(I/8)), of a weight that may be packed.

        Raises ExportError for a tensor that the format cannot hold, such as a Conv1D in compressed-tensors.
        """
        return encoding.storage.spec_of(self, encoding, grid, keep)

    def marked(self, packing: str) -> TensorSpec:
        """Return the tensor in the layout of the format ``packing``."""
        return replace(self, packing=packing)

    def packed(self, packing: str, grid: Grid | None, keep: Tensor) -> TensorSpec:
        """Return the tensor packed and quantised to ``grid``, or unchanged if it does not fit or become smaller.

        ``keep``: row bits of the kept weights, (O, ceil(I/8)) uint8.
        """
        counts = row_counts(keep)
        if int(counts.sum()) == self.numel:
            # nothing was pruned, so the weight does not "stay" dense
            return self
        dense = self.quantised(grid)
        form = packed_format(packing, dense.grid)
        fits = form.accepts(keep, self.matrix) and (form.holds_stacks or len(self.shape) == 2)
        if fits:
            packed = replace(dense, packing=packing, stored_values=form.stored(counts))
            if packed.stored_nbytes <= _MAX_DENSE_SHARE * dense.stored_nbytes:
                if not packed.storage.compresses_bitmask:
                    return packed
                # compressed here to know its size, which the header of the file states before its tensors
                return replace(packed, bitmask_shape=tuple(stored_bits(keep).shape))
        return replace(self, stays_dense=True)


@dataclass(frozen=True, slots=True)
class TensorValues:
    """The values of a tensor of an export."""

    tensor: Tensor
    """Values in the model's shape; those outside ``keep`` are undefined."""
    keep: Tensor | None = None
    """Row bits (O, ceil(I/8)) of the mask that the tensor was pruned with."""
    pruned_per_matrix: tuple[int, ...] = ()
    scales: Tensor | None = None
    """(O, groups) bf16 scales of a tensor that is quantised already."""
    rounding_error: float = 0.0
    """Relative error of an earlier quantisation."""


@dataclass(frozen=True, slots=True)
class TensorJob:
    """Tensors that are made together: one, unless transformers saves one parameter as several tensors."""

    outputs: tuple[TensorSpec, ...]
    recipe: object
    """The source's description of how to make them."""


class Source(Protocol):
    """Source of an export's values."""

    def make(self, job: TensorJob) -> Iterator[TensorValues]:
        """Yield the values of the job's outputs, in their order. Raises ExportError."""
        ...


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A weight file: name, first bytes, place of each tensor, and size in bytes."""

    name: str
    header: bytes
    slots: dict[str, Slot]
    nbytes: int


def plan_files(jobs: Sequence[TensorJob], stem: str, shard_bytes: int) -> list[PlannedFile]:
    """Distribute all outputs over files, in order. All parts of a tensor go into one file.

    ``shard_bytes``: limit for the tensors in a file; only a single larger tensor exceeds it. Raises ExportError if two
    tensors would have the same name.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    names = set[str]()
    for output in all_outputs(jobs):
        parts = output.part_sizes()
        nbytes = output.stored_nbytes
        # a file has at least one tensor, however large that is
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append({})
            filled = 0
        for name in parts:
            if name in names:
                raise ExportError(f"two tensors of the model would have the name {name} in the export")
        names.update(parts)
        shards[-1] |= parts
        filled += nbytes
    files: list[PlannedFile] = []
    for number, shard in enumerate(shards, start=1):
        # transformers' names of weight files
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        header, slots, file_bytes = header_and_slots(shard)
        files.append(PlannedFile(name=name, header=header, slots=slots, nbytes=file_bytes))
    return files


def all_outputs(jobs: Iterable[TensorJob]) -> list[TensorSpec]:
    """Return the tensors that the jobs make, in their order."""
    outputs: list[TensorSpec] = []
    for job in jobs:
        outputs += job.outputs
    return outputs


def require_space(folder: Path, nbytes: int) -> None:
    """Raise ExportError if the disk of ``folder``, which need not exist yet, has less than ``nbytes`` free."""
    place = folder.absolute()
    # the disk of the nearest folder that exists, in which the others will be made
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise ExportError(
            f"{folder} needs {nbytes:,} bytes, and the disk has {free:,} free. Free space, or write to another disk"
        )


def require_packed(jobs: Sequence[TensorJob], encoding: Encoding) -> list[str]:
    """Return the names of sparse weights that stay dense.

    Raises ExportError if nothing is packed, or nothing is quantised, although ``encoding`` asks for it.
    """
    outputs = all_outputs(jobs)
    if encoding.is_quantized and not any(output.grid for output in outputs):
        raise ExportError(
            "no weight can be quantised: values is for linear layers inside the blocks, embeddings for embedding "
            "tables and output layers, and this model has neither"
        )
    # "dense" marks no tensors: there is nothing that could fail to be packed
    if not encoding.storage.marks_tensors or any(output.is_packed for output in outputs):
        return [output.name for output in outputs if output.stays_dense]
    raise ExportError(
        f"no weight would be smaller as {encoding.packing}, so nothing can be packed: 2:4 needs at most two non-zeros "
        "in every four consecutive inputs, bitmask more than 7 % sparsity, and csr more than 50 %. Train with "
        'pst.pattern = "2:4" or more sparsity, or export with format = "dense"'
    )
