"""Safetensors files: one strict reader, which reads single tensors by offset, and the layout for writing by offset.

A file is 8 bytes with the little-endian length of its header, the header as JSON, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

import torch
from torch import Tensor

from pst_ds.errors import InputError

DTYPE_OF_CODE = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64, "U64": torch.uint64,
    "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_CHUNK_BYTES = 1 << 28
"""Bytes per system call: Linux transfers at most 2 GB in one."""
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,512}")


class TensorFileError(InputError):
    """A damaged or hostile safetensors file; the message starts with its path."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The dtype, shape and place of a tensor in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file. The header is checked when it is opened; tensors are read on request.

    Reads go into new memory instead of a mapping, so the pages of a large file do not count towards the process.
    """

    def __init__(self, path: Path):
        """Read and check the header.

        Raises:
            FileNotFoundError: there is no file at ``path``.
            TensorFileError: the header is invalid; the message names the tensor, if there is one.
        """
        self.path = path
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            self.slots = _read_slots(stream, size, path)

    def read(self, name: str) -> Tensor:
        """Return the tensor ``name``. Raises TensorFileError if the file was truncated after it was opened."""
        slot = self.slots[name]
        return self._read_bytes(name, 0, slot.nbytes).view(slot.dtype).view(slot.shape)

    def read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows [first, last) of a tensor (..., columns), viewed as the matrix (rows, columns)."""
        columns = self.slots[name].shape[-1]
        return self.read_flat(name, first * columns, last * columns).view(last - first, columns)

    def read_flat(self, name: str, first: int, last: int) -> Tensor:
        """Return values [first, last) of a tensor in storage order, (last - first,)."""
        dtype = self.slots[name].dtype
        return self._read_bytes(name, first * dtype.itemsize, last * dtype.itemsize).view(dtype)

    def _read_bytes(self, name: str, first: int, last: int) -> Tensor:
        """Return bytes [first, last) of a tensor, uint8."""
        data = torch.empty(last - first, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self.slots[name].offset + first)
            view, done = data.numpy().data, 0
            while done < len(view):
                count = stream.readinto(view[done : done + _CHUNK_BYTES])
                if not count:
                    raise TensorFileError(f"{self.path} is damaged: it ends inside {name}")
                done += count
        return data


def unique_json(text: str | bytes) -> object:
    """Parse JSON in which no object repeats a key. Raises ValueError."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is repeated")
    return table


def _read_slots(stream: BinaryIO, size: int, path: Path) -> dict[str, Slot]:
    """Read the header of a file of ``size`` bytes; return the slot of each tensor. Raises TensorFileError."""
    length = stream.read(8)
    count = int.from_bytes(length, "little")
    if len(length) < 8 or count > min(MAX_HEADER_BYTES, size - 8):
        raise TensorFileError(f"{path} is damaged: its header would have {count} bytes, and the file has {size}")
    try:
        table = unique_json(stream.read(count))
    except ValueError as error:  # not JSON, not UTF-8, or a number with thousands of digits
        raise TensorFileError(f"{path} is damaged: its header is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise TensorFileError(f"{path} is damaged: its header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileError(f"{path} is damaged: __metadata__ has values that are not strings")
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
    """Check one entry of a header; ``start``: offset of the first tensor. Raises TensorFileError."""
    if not _NAME.fullmatch(name):
        raise TensorFileError(f"{path} is damaged: a tensor is named {name[:80]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"{path} is damaged: the entry of {name} must have dtype, shape and data_offsets")
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


def header_and_slots(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, Slot], int]:
    """Lay out a file for tensors of these dtypes and shapes.

    Wide dtypes come first, then names in order, so every tensor is aligned to its item size. The header is padded with
    spaces to a multiple of 8 bytes.

    Returns:
        The first bytes of the file, the slot of each tensor, and the size of the file in bytes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    slots, end = {}, 0
    for name in order:
        slot = slots[name] = Slot(*tensors[name], end)
        end += slot.nbytes
        table[name] = {
            "dtype": CODE_OF_DTYPE[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [slot.offset, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    placed = {name: Slot(slot.dtype, slot.shape, start + slot.offset) for name, slot in slots.items()}
    return len(text).to_bytes(8, "little") + text, placed, start + end


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without copying them."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of an open file."""
    while data:
        count = os.pwrite(handle, data[:_CHUNK_BYTES], offset)
        data, offset = data[count:], offset + count
