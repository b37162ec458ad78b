"""The plan of an export: which tensors are made together, how, and where they go in the weight files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pst_ds.core.packings import DENSE
from pst_ds.export.encoding import Encoding, ExportError
from pst_ds.export.tensor_spec import TensorSpec
from pst_ds.formats.safetensors_file import Slot, header_and_slots

SHARD_BYTES = 5 << 30
"""Default size limit of a weight file."""


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
    """The source's description of how to make them; can be sent to another process."""
    in_parent: bool = False
    """Whether making them needs the model, which other processes do not have."""


class Source(Protocol):
    """Where the values of an export come from. Copies of it are sent to every process that writes."""

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

    Args:
        jobs: the tensors.
        stem: start of the files' names.
        shard_bytes: limit for the tensors in a file; only a single larger tensor exceeds it.

    Raises ExportError if two tensors would have the same name.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    filled = 0
    for output in (output for job in jobs for output in job.outputs):
        parts, nbytes = output.part_sizes(), output.stored_nbytes
        if shards[-1] and filled + nbytes > shard_bytes:
            shards, filled = [*shards, {}], 0
        twice = next((name for name in parts for shard in shards if name in shard), None)
        if twice:
            raise ExportError(f"two tensors of the model would have the name {twice} in the export")
        shards[-1] |= parts
        filled += nbytes
    count = len(shards)
    ends = [f"-{i + 1:05d}-of-{count:05d}" for i in range(count)] if count > 1 else [""]
    return [PlannedFile(f"{stem}{e}.safetensors", *header_and_slots(s)) for e, s in zip(ends, shards, strict=True)]


def require_space(folder: Path, nbytes: int) -> None:
    """Raise ExportError if the disk of ``folder``, which need not exist yet, has less than ``nbytes`` free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise ExportError(
            f"{folder} needs {nbytes:,} bytes, and the disk has {free:,} free. Name another folder with --out"
        )


def require_packed(jobs: Sequence[TensorJob], encoding: Encoding) -> list[str]:
    """Return the names of sparse weights that stay dense.

    Raises ExportError if nothing is packed, or nothing is quantised, although ``encoding`` asks for it.
    """
    outputs, packing = [output for job in jobs for output in job.outputs], encoding.packing
    if encoding.is_quantized and not any(output.grid for output in outputs):
        raise ExportError(
            "no weight can be quantised: --values is for linear layers inside the blocks, --embeddings for embedding "
            "tables and output layers, and this model has neither"
        )
    if packing == DENSE or any(output.packing != DENSE for output in outputs):
        return [output.name for output in outputs if output.stays_dense]
    if packing == "2:4":
        raise ExportError(
            "no weight is 2:4 (at most two non-zeros in every four consecutive inputs), so nothing can be packed. "
            'Train with pst.pattern = "2:4" (final sparsity 0.5), or export with --format bitmask'
        )
    raise ExportError(
        f"no weight would be smaller as {packing} than it is dense, so nothing can be packed: bitmask needs more than "
        "7 % sparsity and csr more than 50 %. Export with --format dense"
    )
