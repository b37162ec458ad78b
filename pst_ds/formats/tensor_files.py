"""Safetensors files, read and written by offset, with a strict reader of headers."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from pst_ds.errors import InputError
from pst_ds.formats.tensor_layout import DTYPE_OF_CODE, Slot

MOST_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_AT_A_TIME = 1 << 28
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,512}")


class TensorFileError(InputError):
    """A safetensors file that is damaged or hostile; the message begins with its path."""


class TensorFile:
    """One safetensors file. Its header is checked when it is opened; tensors are read when they are asked for.

    Bytes are read into memory of their own, not mapped, so that a file's pages do not stay with the process.
    """

    def __init__(self, path: Path):
        """Read the header. Raises FileNotFoundError, and TensorFileError, naming the tensor where there is one."""
        self.path = path
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            self.slots = _slots(stream.read(8), stream, size, path)

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, in memory of its own. Raises TensorFileError when the file has become shorter."""
        slot = self.slots[name]
        return self._read(name, 0, slot.nbytes).view(slot.dtype).view(slot.shape)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of the matrix that a tensor of more than one dimension is in memory, as :meth:`read`."""
        slot = self.slots[name]
        width = slot.shape[-1] * slot.dtype.itemsize
        return self._read(name, first * width, last * width).view(slot.dtype).view(last - first, slot.shape[-1])

    def _read(self, name: str, first: int, last: int) -> Tensor:
        """Bytes [first, last) of a tensor."""
        data = torch.empty(last - first, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.slots[name].offset + first)
            view, done = data.numpy().data, 0
            while done < len(view):
                count = stream.readinto(view[done : done + _AT_A_TIME])
                if not count:
                    raise TensorFileError(f"{self.path} is damaged: it ends inside {name}")
                done += count
        return data


def unique_json(text: str | bytes) -> Any:
    """JSON in which no object has a key twice. Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return table


def _slots(length: bytes, stream: BinaryIO, size: int, path: Path) -> dict[str, Slot]:
    count = int.from_bytes(length, "little")
    if len(length) < 8 or count > min(MOST_HEADER_BYTES, size - 8):
        raise TensorFileError(f"{path} is damaged: its header would be {count} bytes of a file of {size}")
    try:
        table = unique_json(stream.read(count))
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise TensorFileError(f"{path} is damaged: its header is no JSON: {error}") from None
    if not isinstance(table, dict):
        raise TensorFileError(f"{path} is damaged: its header is no table")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError(f"{path} is damaged: __metadata__ holds other things than texts")
    slots = {name: _slot(name, entry, 8 + count, path) for name, entry in table.items()}
    end = 8 + count
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if slot.offset != end:
            where = "overlaps the tensor before it" if slot.offset < end else "leaves a gap before it"
            raise TensorFileError(f"{path} is damaged: {name} {where}")
        end += slot.nbytes
    if end != size:
        raise TensorFileError(f"{path} is damaged: its tensors end at byte {end}, and the file at {size}")
    return slots


def _slot(name: str, entry: object, start: int, path: Path) -> Slot:
    """One entry of a header, by itself."""
    if not _NAME.fullmatch(name):
        raise TensorFileError(f"{path} is damaged: a tensor is named {name[:80]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"{path} is damaged: the entry of {name} has not dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPE_OF_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise TensorFileError(f"{path}: {name} has dtype {str(code)[:40]!r}; known are {', '.join(DTYPE_OF_CODE)}")
    sizes_hold = isinstance(shape, list) and len(shape) <= 16 and all(map(_is_size, shape))
    sizes_hold = sizes_hold and math.prod(max(size, 1) for size in shape) < 1 << 60  # torch multiplies them too
    if not sizes_hold or not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise TensorFileError(f"{path} is damaged: {name} has shape {str(shape)[:80]} at {str(offsets)[:80]}")
    slot = Slot(dtype, tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != slot.nbytes:
        raise TensorFileError(
            f"{path} is damaged: {name} has {slot.nbytes} bytes by its shape, {offsets[1] - offsets[0]} by its offsets"
        )
    return slot


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 48


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of an open file; one call writes at most 2 GB."""
    while data:
        count = os.pwrite(handle, data[:_AT_A_TIME], offset)
        data, offset = data[count:], offset + count
