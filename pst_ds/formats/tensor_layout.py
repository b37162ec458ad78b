"""What a safetensors file is made of: dtypes by their codes, its first bytes, and where its tensors lie.

A file is 8 bytes with the little-endian length of its header, the header as JSON, and the tensors' bytes without a gap.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPE_OF_CODE = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "I64": torch.int64, "U64": torch.uint64,
    "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header_and_slots(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, Slot], int]:
    """(first bytes of a file, slot of each tensor, size of the file) for tensors of these dtypes and shapes.

    Wide items come first, then names in order, so every tensor is aligned to its item size; the header is padded with
    spaces to a multiple of 8 bytes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        size = math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": CODE_OF_DTYPE[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    slots = {n: Slot(*tensors[n], start + table[n]["data_offsets"][0]) for n in order}
    return len(text).to_bytes(8, "little") + text, slots, start + end


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
