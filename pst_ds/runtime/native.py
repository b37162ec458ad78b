"""CPU kernels for products with a bitmask weight, from ``bitmask/bitmask.cpp``."""

from collections.abc import Sequence
from ctypes import c_int, c_int64
from functools import cache, partial

import torch
from torch import Tensor

from pst_ds.core.kernels import INT, POINTER, NativeSource, load

LEVELS = ("portable", "avx2", "avx512", "amx")
"""Instruction sets of the kernels: plain C++; AVX2 with FMA; AVX-512 with VBMI2 and BF16; the same with AMX."""
DTYPES = (torch.bfloat16, torch.float32)
SOURCE = NativeSource(
    "bitmask/bitmask.cpp",
    {
        "pst_best_level": ([], c_int),
        "pst_bitmask_linear": ([POINTER] * 3 + [INT] * 3 + [POINTER] * 3 + [INT] + [c_int] * 3, c_int),
        "pst_bitmask_experts": ([POINTER] * 3 + [INT] * 2 + [POINTER, INT] + [POINTER] * 2 + [c_int] * 3, c_int),
    },
    "sparse layers",
    flags=("-std=c++17", "-O3"),
    may_flags=("-fopenmp",),
    announce=True,
)
library = cache(partial(load, SOURCE))
"""Compiled kernels, or None if they cannot be built; the layers then compute with torch.

torch is loaded first, so that both share its OpenMP and one thread pool.
"""


@cache
def best_level() -> int:
    """Return the index in :data:`LEVELS` of the best instruction set that this processor supports."""
    native = library()
    return 0 if native is None else native.pst_best_level()


def bitmask_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, row_offsets: Tensor, bias: Tensor | None, level: int
) -> Tensor:
    """Compute x W' + bias on the CPU: (..., I) to (..., O) in the dtype of ``values`` and ``x``, one of :data:`DTYPES`.

    ``values``, ``bitmask`` (O, ceil(I / 8)) and ``row_offsets`` (O,) are parts that have passed their format's check.
    Sums are fp32. The dot instructions of AVX-512 and AMX treat denormal bf16 numbers, below 2^-126, as 0. Raises
    ValueError if ``x`` and the parts do not fit together, and MemoryError without room for a copy of ``x``.
    """
    native = library()
    assert native is not None
    x = x.contiguous()  # C++ gets addresses, no strides
    columns = x.shape[-1]
    rows = bitmask.shape[0]
    # C++ trusts these sizes, and would read beyond the tensors
    if bitmask.shape[1] != (columns + 7) // 8 or row_offsets.shape[0] != rows or values.dtype != x.dtype:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}; the weight has {values.dtype} values, a bitmask of "
            f"{tuple(bitmask.shape)} bytes and {row_offsets.shape[0]} row offsets"
        )
    y = x.new_empty((*x.shape[:-1], rows))
    bias_pointer = 0
    if bias is not None:
        bias_pointer = bias.data_ptr()
    failed = native.pst_bitmask_linear(
        values.data_ptr(),
        bitmask.data_ptr(),
        row_offsets.data_ptr(),
        rows,
        columns,
        values.numel(),
        x.data_ptr(),
        bias_pointer,
        y.data_ptr(),
        x.numel() // columns,  # vectors
        x.element_size(),  # tells bf16 from fp32
        torch.get_num_threads(),
        level,
    )
    if failed:
        raise MemoryError(f"not enough memory to multiply {tuple(x.shape)} with a sparse weight of {rows} x {columns}")
    return y


def bitmask_experts(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    expert_offsets: Tensor,
    starts: Sequence[int],
    runs: Sequence[tuple[int, slice]],
    level: int,
) -> Tensor:
    """Compute x W' with the expert of each run of rows, (n, I) to (n, O), as :func:`bitmask_linear` does.

    ``values``, ``bitmask`` (E*O, ceil(I / 8)): of all experts. ``expert_offsets``: (E*O,), offset of each row from its
    expert's first value. ``starts``: first values of the experts, and the end. ``runs``: experts and their rows.
    """
    native = library()
    assert native is not None
    x = x.contiguous()
    columns = x.shape[-1]
    rows = bitmask.shape[0] // (len(starts) - 1)
    assert bitmask.shape[1] == (columns + 7) // 8
    assert values.dtype == x.dtype
    y = x.new_empty(x.shape[0], rows)
    # five numbers per run: the expert, its first value, how many it has, its first vector, how many it has
    table: list[int] = []
    for expert, vectors in runs:
        start = starts[expert]
        stop = starts[expert + 1]
        table += [expert, start, stop - start, vectors.start, vectors.stop - vectors.start]
    failed = native.pst_bitmask_experts(
        values.data_ptr(),
        bitmask.data_ptr(),
        expert_offsets.data_ptr(),
        rows,
        columns,
        (c_int64 * len(table))(*table),
        len(runs),
        x.data_ptr(),
        y.data_ptr(),
        x.element_size(),  # tells bf16 from fp32
        torch.get_num_threads(),
        level,
    )
    if failed:
        raise MemoryError(f"not enough memory to multiply {tuple(x.shape)} with experts of {rows} x {columns}")
    return y
