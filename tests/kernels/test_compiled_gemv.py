"""The product of a bitmask weight with a vector as a GPU would run it."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.runtime import gemv_kernels as kernels

from .compiled import compiled


def machine(capability, unroll):
    pointers = {
        "x_ptr": "*fp32",
        "values_ptr": "*bf16",
        "words_ptr": "*i32",
        "offsets_ptr": "*i64",
        "bias_ptr": "*bf16",
    }
    types = {**pointers, "y_ptr": "*bf16", **dict.fromkeys(("x_vector", "num_words", "y_vector"), "i32")}
    return compiled(kernels.bitmask_vector, types, {"UNROLL": unroll}, capability, fuse=True, num_warps=1)


def test_a_kept_weight_takes_few_instructions():
    found, shorter = (machine(90, unroll) for unroll in (kernels.UNROLL, kernels.UNROLL // 2))
    assert found.spilled_bytes == 0
    assert found.registers <= 48
    each = (found.num_instructions - shorter.num_instructions) / (kernels.UNROLL - kernels.UNROLL // 2)
    assert each <= 12
