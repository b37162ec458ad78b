"""Safetensors files: a reader of single tensors by offset, and the layout for writing by offset.

A file is 8 bytes with the little-endian length of its header, the header as JSON, and the tensors' bytes without gaps.
"""

import json
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pst_ds.errors import InputError

DTYPE_OF_CODE = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64, "U64": torch.uint64,
    "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
_CHUNK_BYTES = 1 << 28
"""Bytes per system call: Linux transfers at most 2 GB in one."""


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

    def __init__(self, path: Path, *, held: bool = False):
        """Read and check the header.

        Args:
            path: the file.
            held: keep the file open, so that it can be read after another process has removed it.

        Raises:
            FileNotFoundError: there is no file at ``path``.
            TensorFileError: the header is invalid; the message names the tensor, if there is one.
        """
        self.path = path
        self.slots = _read_slots(path)
        self._handle: int | None = None
        if held:
            self._handle = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)

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
        # opened for each read otherwise, since a model may have more files than a process may have open
        handle = os.open(self.path, os.O_RDONLY) if self._handle is None else self._handle
        try:
            offset = self.slots[name].offset + first
            view = data.numpy().data
            done = 0
            # a read may return fewer bytes than it was asked for, such as on a network file system
            while done < len(view):
                count = os.preadv(handle, [view[done : done + _CHUNK_BYTES]], offset + done)
                if not count:
                    raise TensorFileError(f"{self.path} is damaged: it ends inside {name}")
                done += count
        finally:
            if handle != self._handle:
                os.close(handle)
        return data


def _read_slots(path: Path) -> dict[str, Slot]:
    """Return the slot of each tensor in a file. Raises FileNotFoundError, and TensorFileError for an invalid header."""
    try:
        with safe_open(path, "np"):
            pass  # checks that the tensors have known sizes, and fill the file without gaps
    except SafetensorError as error:
        raise TensorFileError(f"{path} is damaged: {error}") from None
    with path.open("rb") as stream:
        count = int.from_bytes(stream.read(8), "little")
        table = json.loads(stream.read(count))
    table.pop("__metadata__", None)
    slots: dict[str, Slot] = {}
    for name, entry in table.items():
        dtype = DTYPE_OF_CODE.get(entry["dtype"])
        shape = tuple(entry["shape"])
        # torch multiplies the sizes of empty tensors too, and its products overflow
        num_values = math.prod(max(size, 1) for size in shape)
        if dtype is None or len(shape) > 16 or num_values >= 1 << 60:
            known = ", ".join(DTYPE_OF_CODE)
            raise TensorFileError(f"{path}: {name} is {entry['dtype']} of shape {str(shape)[:80]}; known are {known}")
        slots[name] = Slot(dtype, shape, 8 + count + entry["data_offsets"][0])
    return slots


def header_and_slots(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, Slot], int]:
    """Lay out a file for tensors of these dtypes and shapes.

    Wide dtypes come first, then names in order, so every tensor is aligned to its item size. The header is padded with
    spaces to a multiple of 8 bytes.

    Returns:
        The first bytes of the file, the slot of each tensor, and the size of the file in bytes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    slots: dict[str, Slot] = {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        slot = Slot(dtype, shape, end)
        slots[name] = slot
        end += slot.nbytes
        table[name] = {
            "dtype": CODE_OF_DTYPE[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [slot.offset, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # an offset in the header counts from the header's end, an offset of a Slot from the start of the file
    start = 8 + len(text)
    placed = {name: replace(slot, offset=start + slot.offset) for name, slot in slots.items()}
    return len(text).to_bytes(8, "little") + text, placed, start + end


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor without copying them."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of an open file."""
    while data:
        count = os.pwrite(handle, data[:_CHUNK_BYTES], offset)
        data = data[count:]
        offset += count
