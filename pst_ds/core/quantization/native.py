"""C++ loops of quantisation (``rounding.cpp``). Callers have a torch version for machines without them."""

from __future__ import annotations

from ctypes import CDLL
from functools import cache

import torch
from torch import Tensor

from pst_ds.core.kernels import INT, POINTER, NativeSource, load

NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes of weights that the loops support, by their number in C++."""
SOURCE = NativeSource(
    "rounding.cpp",
    {
        "pst_round_to_grid": ([POINTER, INT, INT, INT, INT, POINTER, POINTER, INT, INT], None),
        "pst_round_inputs": ([POINTER, POINTER, INT, INT, INT, INT, INT], None),
        "pst_expand_codes": (
            [POINTER, POINTER, POINTER, INT, POINTER, POINTER, INT, INT, INT, INT, INT],
            None,
        ),
        "pst_whole_weights": ([POINTER, INT, INT, POINTER, POINTER, INT], None),
        "pst_grid_losses": ([POINTER, INT, INT, POINTER, INT, POINTER, POINTER, INT], None),
        "pst_grid_moments": ([POINTER, POINTER, INT, INT, POINTER, INT, POINTER, POINTER, INT], None),
    },
    "rounding to a grid",
    may_flags=("-fopenmp",),
)
_WORTH_THREADS = 1 << 16


@cache
def library() -> CDLL | None:
    """Return the functions of rounding.cpp, or None if they are not available."""
    return load(SOURCE)


def native_for(*tensors: Tensor) -> CDLL | None:
    """Return the library if all ``tensors`` are on the CPU, else None."""
    return library() if all(tensor.device.type == "cpu" for tensor in tensors) else None


def threads_for(numel: int) -> int:
    """Return how many threads a loop over ``numel`` weights uses."""
    return torch.get_num_threads() if numel >= _WORTH_THREADS else 1
