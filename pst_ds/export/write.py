"""Values into files: each tensor is made, packed, hashed and written to its own place, on one process or several."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.bits import INT_OF_SIZE
from pst_ds.core.packings import WHOLE_ROW
from pst_ds.export.detect_pattern import detect_pattern, per_row
from pst_ds.export.manifest import DENSE, ExportError, PartEntry, TensorEntry, count_nonzero
from pst_ds.export.plan import PlannedFile, PlannedTensor, Source, TensorJob, TensorValues
from pst_ds.export.rounding import matrix_of, rounded
from pst_ds.formats import FormatError, PackedFormat, QuantizedFormat, row_bits
from pst_ds.formats.safetensors_file import CODE_OF_DTYPE, Slot, tensor_bytes, write_at
from pst_ds.progress import Progress

WriterArguments = tuple[Path, Sequence[PlannedFile], Source]
_Result = Future[list[TensorEntry]]


class WorkerError(RuntimeError):
    """A process of an export ended before its work was done."""


class Writer:
    """Fills planned files; every process has one."""

    def __init__(self, folder: Path, files: Sequence[PlannedFile], source: Source):
        self._folder, self._source = folder, source
        self._place: dict[str, tuple[str, Slot]] = {n: (f.name, slot) for f in files for n, slot in f.slots.items()}
        self._handles: dict[str, int] = {}

    def write(self, job: TensorJob) -> list[TensorEntry]:
        """Make and write all outputs of ``job``. Raises ExportError."""
        made = self._source.make(job)
        return [self._write_one(output, [next(made)]) for output in job.outputs]

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _write_one(self, output: PlannedTensor, made: list[TensorValues]) -> TensorEntry:
        """``made`` holds the one reference to the values, so that they are gone once they are packed."""
        one = made.pop()
        rest, parts = replace(one, tensor=torch.empty(0)), [_require_planned(output, one.tensor)]
        del one
        nonzero, pattern, error = -1, DENSE, 0.0
        if isinstance(output.form, QuantizedFormat):
            parts, nonzero, pattern, error = rounded(output, output.form, parts, rest)
        elif output.form is not None:
            packed = _packed(output, output.form, parts, rest.keep)
            nonzero, pattern = _found(output, output.form, packed, rest.keep)
            parts = [packed[name] for name in output.form.part_names]
            del packed
        elif output.is_linear:
            bits = row_bits(matrix_of(output, parts[0])).numpy()
            nonzero, pattern = int(per_row(bits).sum()), detect_pattern(bits, output.matrix[1])
        else:
            nonzero = count_nonzero(parts[0])
        written = [self._write_part(n, part) for n, part in zip(output.parts(), parts, strict=True)]
        return TensorEntry(
            name=output.name, shape=list(output.shape), dtype=CODE_OF_DTYPE[output.dtype], origin=output.origin,
            nonzero=nonzero, pattern=pattern, pruned_per_matrix=list(rest.pruned_per_matrix),
            matrix_axis=int(output.transposed), packing=output.packing, transposed=output.transposed, parts=written,
            values=output.grid.values if output.grid else "",
            group=output.grid.group or WHOLE_ROW if output.grid else "", rounding_error=error,
        )  # fmt: skip

    def _write_part(self, name: str, tensor: Tensor) -> PartEntry:
        file, slot = self._place[name]
        if (tensor.dtype, tuple(tensor.shape)) != (slot.dtype, slot.shape):
            raise RuntimeError(f"{name} was planned as {slot} and made as {tensor.dtype} {tuple(tensor.shape)}")
        if file not in self._handles:
            self._handles[file] = os.open(self._folder / file, os.O_WRONLY)
        data = tensor_bytes(tensor)
        write_at(self._handles[file], data, slot.offset)
        return PartEntry(name, file, hashlib.sha256(data).hexdigest())


def write_tensors(
    folder: Path, files: Sequence[PlannedFile], jobs: Sequence[TensorJob], source: Source, processes: int
) -> list[TensorEntry]:
    """Write all files into ``folder``; the entries in the order of the jobs.

    The bytes do not depend on ``processes``. Raises ExportError, and WorkerError when a process was killed.
    """
    for file in files:
        with (folder / file.name).open("wb") as stream:
            stream.write(file.header)
            stream.truncate(file.nbytes)
    sizes = [sum(output.nbytes for output in job.outputs) for job in jobs]
    entries: dict[int, list[TensorEntry]] = {}
    with Progress("export", sum(sizes), "bytes") as progress:
        for index, found in _written((folder, files, source), jobs, processes):
            entries[index] = found
            progress.add(sizes[index])
    return [entry for index in range(len(jobs)) for entry in entries[index]]


def _written(
    arguments: WriterArguments, jobs: Sequence[TensorJob], processes: int
) -> Iterator[tuple[int, list[TensorEntry]]]:
    """(index of a job, its entries) as they get done."""
    shared = [i for i, job in enumerate(jobs) if processes > 1 and not job.in_parent]
    with ExitStack() as stack:
        running = stack.enter_context(_running(arguments, [jobs[i] for i in shared], processes)) if shared else {}
        writer = Writer(*arguments)
        stack.callback(writer.close)
        for i in sorted(set(range(len(jobs))) - set(shared)):
            yield i, writer.write(jobs[i])
        pending = set(running)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield shared[running[future]], _result(future)


@contextmanager
def _running(arguments: WriterArguments, jobs: list[TensorJob], processes: int) -> Iterator[dict[_Result, int]]:
    """Run the jobs on spawned processes: a fork would copy locks that torch's threads may hold."""
    threads = max(1, torch.get_num_threads() // processes)
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(jobs)), spawn, _begin, (arguments, threads))
    try:
        yield {pool.submit(_write_in_worker, job): i for i, job in enumerate(jobs)}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: _Result) -> list[TensorEntry]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise WorkerError(
            "a process of the export was killed, perhaps for memory; nothing was written. Use fewer --processes"
        ) from error


_writer: Writer | None = None
"""In a process that :func:`_running` started."""


def _begin(arguments: WriterArguments, threads: int) -> None:
    global _writer
    torch.set_num_threads(threads)
    _writer = Writer(*arguments)


def _write_in_worker(job: TensorJob) -> list[TensorEntry]:
    assert _writer is not None
    return _writer.write(job)


def _require_planned(output: PlannedTensor, tensor: Tensor) -> Tensor:
    if tuple(tensor.shape) != output.shape:
        raise ExportError(
            f"{output.name} has shape {tuple(tensor.shape)} in the base model or checkpoint, and {output.shape} in the "
            "trained model"
        )
    return tensor.to(output.dtype)


def _packed(output: PlannedTensor, form: PackedFormat, held: list[Tensor], keep: Tensor | None) -> dict[str, Tensor]:
    """The parts of the one tensor in ``held``, which is let go. Raises ExportError."""
    matrix = matrix_of(output, held.pop())
    if output.transposed:
        matrix = matrix.contiguous()  # and the stored orientation is gone
    try:
        return form.pack(matrix, keep, output.name)
    except FormatError as error:
        raise ExportError(str(error)) from None


def _found(
    output: PlannedTensor, form: PackedFormat, packed: dict[str, Tensor], keep: Tensor | None
) -> tuple[int, str]:
    """(non-zeros, pattern found) of a packed tensor."""
    values, inputs = packed[form.values_name], output.matrix[1]
    as_int = values.view(INT_OF_SIZE[values.element_size()])  # a packed zero is +0.0, and integers are counted sooner
    nonzero = int(torch.count_nonzero(as_int))
    bits = packed.get("bitmask", keep)
    if nonzero != values.numel() or bits is None:  # some kept positions are zero
        bits = row_bits(form.unpack(packed))
    return nonzero, detect_pattern(np.asarray(bits.numpy()), inputs)
