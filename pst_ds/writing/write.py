"""Write the weight files of an export: make, pack, hash and store each tensor."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pst_ds.core.bits import INT_OF_SIZE
from pst_ds.core.packings import WHOLE_ROW
from pst_ds.formats import FormatError, PackedFormat, QuantizedFormat, row_bits, stored_bits
from pst_ds.formats.rows import row_counts
from pst_ds.formats.safetensors_file import CODE_OF_DTYPE, Slot, tensor_bytes, write_at
from pst_ds.progress import Progress
from pst_ds.writing.detect_pattern import NO_PATTERN, detect_pattern
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import ExportedTensor, StoredPart, count_nonzero
from pst_ds.writing.plan import PlannedFile, Source, TensorJob, TensorSpec, TensorValues
from pst_ds.writing.quantization import PackedTensor, quantised_parts

Places = dict[str, tuple[BinaryIO, Slot]]
"""The open file and the slot of every part, by its name."""


def write_tensors(
    folder: Path, files: Sequence[PlannedFile], jobs: Sequence[TensorJob], source: Source
) -> list[ExportedTensor]:
    """Write all files into ``folder``; return the tensors in the order of the jobs. Raises ExportError."""
    tensors = list[ExportedTensor]()
    places = Places()
    # progress counts dense bytes, which take time to make, not the stored ones
    nbytes: list[int] = []
    for job in jobs:
        nbytes.append(sum(output.dense_nbytes for output in job.outputs))
    with ExitStack() as stack:
        for file in files:
            stream = stack.enter_context((folder / file.name).open("wb", buffering=0))
            write_at(stream.fileno(), memoryview(file.header), 0)
            # the full size at once, because tensors are written at their offsets in the order of the jobs
            stream.truncate(file.nbytes)
            places |= {name: (stream, slot) for name, slot in file.slots.items()}
        progress = stack.enter_context(Progress("export", sum(nbytes), "bytes"))
        for job, size in zip(jobs, nbytes, strict=True):
            values = source.make(job)
            for output in job.outputs:
                # a list, so that the writer can drop the last reference to the values
                tensors.append(_written(output, [next(values)], places))
            progress.add(size)
    return tensors


def _written(output: TensorSpec, only: list[TensorValues], places: Places) -> ExportedTensor:
    """Write a tensor. ``only`` holds the only reference to its values, so they are freed once they are packed."""
    values = only.pop()
    known = replace(values, tensor=torch.empty(0))
    weights = [values.tensor.to(output.dtype)]
    del values
    packed = _packed(output, weights, known)
    parts = packed.parts
    if output.bitmask_shape:
        assert output.form is not None
        i = output.form.part_names.index("bitmask")
        parts[i] = stored_bits(parts[i])
    written: list[StoredPart] = []
    for name, part in zip(output.part_names(), parts, strict=True):
        stream, slot = places[name]
        written.append(_written_part(name, part, stream, slot))
    values_name = ""
    group: int | str = ""
    if output.grid is not None:
        values_name = output.grid.values
        group = output.grid.group or WHOLE_ROW
    return ExportedTensor(
        name=output.name,
        shape=output.shape,
        dtype=CODE_OF_DTYPE[output.dtype],
        origin=output.origin,
        nonzero=packed.nonzero,
        pattern=packed.pattern,
        pruned_per_matrix=known.pruned_per_matrix,
        matrix_axis=1 if output.transposed else 0,
        packing=output.packing,
        transposed=output.transposed,
        parts=tuple(written),
        values=values_name,
        group=group,
        rounding_error=packed.rounding_error,
    )


def _packed(output: TensorSpec, weights: list[Tensor], known: TensorValues) -> PackedTensor:
    """Pack the only tensor in ``weights`` as the export stores it. Raises ExportError."""
    form = output.form
    if isinstance(form, QuantizedFormat):
        return quantised_parts(output, form, weights, known)
    if form is not None:
        by_name = _parts_of_floats(output, form, weights, known.keep)
        nonzero, pattern = _count_packed(output, form, by_name, known.keep)
        return PackedTensor([by_name[name] for name in form.part_names], nonzero, pattern)
    if output.is_linear:
        # the bits give the count, too, so that a large weight is read once
        bits = row_bits(output.as_matrix(weights[0]))
        _, inputs = output.matrix
        return PackedTensor(parts=weights, nonzero=int(row_counts(bits).sum()), pattern=detect_pattern(bits, inputs))
    return PackedTensor(parts=weights, nonzero=count_nonzero(weights[0]), pattern=NO_PATTERN)


def _written_part(name: str, tensor: Tensor, stream: BinaryIO, slot: Slot) -> StoredPart:
    """Write a part at its place; return its entry in the manifest."""
    # a tensor of another size would overwrite its neighbour; this is a bug in a source, not in the user's files
    if (tensor.dtype, tuple(tensor.shape)) != (slot.dtype, slot.shape):
        raise RuntimeError(f"{name} was planned as {slot} and made as {tensor.dtype} {tuple(tensor.shape)}")
    data = tensor_bytes(tensor)
    write_at(stream.fileno(), data, slot.offset)
    return StoredPart(name=name, file=Path(stream.name).name, sha256=hashlib.sha256(data).hexdigest())


def _parts_of_floats(
    output: TensorSpec, form: PackedFormat, weights: list[Tensor], keep: Tensor | None
) -> dict[str, Tensor]:
    """Pack the only tensor in ``weights``, which is removed to free its memory early. Raises ExportError."""
    matrix = output.as_matrix(weights.pop())
    if output.transposed:
        matrix = matrix.contiguous()  # a copy, so the stored orientation is freed
    try:
        return form.pack(matrix, keep, output.name)
    except FormatError as error:
        raise ExportError(str(error)) from None


def _count_packed(
    output: TensorSpec, form: PackedFormat, packed: dict[str, Tensor], keep: Tensor | None
) -> tuple[int, str]:
    """Return (non-zeros, sparsity pattern) of a packed tensor."""
    values = packed[form.values_name]
    # a packed zero is +0.0, so integers of the same width can be counted, which is faster
    as_int = values.view(INT_OF_SIZE[values.element_size()])
    nonzero = int(torch.count_nonzero(as_int))
    bits = packed.get("bitmask", keep)
    if nonzero != values.numel() or bits is None:  # some kept weights are zero
        bits = row_bits(form.unpack(packed))
    return nonzero, detect_pattern(bits, output.matrix[1])
