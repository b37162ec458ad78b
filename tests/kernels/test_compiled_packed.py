"""Products with packed weights as a GPU would run them."""

from __future__ import annotations

import pytest

from tests.pairs import every_pair

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.core.kernels.triton import vector_kernels

from .compiled import CAPABILITIES, compiled

POINTERS = {"bits_ptr": "*i32", "offsets_ptr": "*i64", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
CODES = {"i8": 8, "u8": 4}


def of_values(values, types):
    """Types and constants of a weight with such ``values``, a scale for 64 inputs of codes."""
    types = {**POINTERS, **types, "values_ptr": f"*{values}"}
    constants = {"BITS": CODES.get(values, 0), "GROUP_WORDS": 2, "GROUPS": 64}
    if values in CODES:
        return {**types, "scales_ptr": "*bf16"}, constants
    return types, {**constants, "scales_ptr": None}


def of_experts(types, constants, name, kind, stacked):
    """With the argument that tells experts apart, or None for it."""
    return ({**types, name: kind}, constants) if stacked else (types, {**constants, name: None})


STACKED = pytest.mark.parametrize("stacked", [False, True], ids=["one", "experts"])


def walk(capability, values, unroll, stacked=False):
    types, constants = of_values(
        values, {"x_ptr": "*fp32", **dict.fromkeys(("x_vector", "columns", "y_vector"), "i32")}
    )
    types["lead"] = "i32"
    types, constants = of_experts(types, constants, "experts_ptr", "*i64", stacked)
    return compiled(
        vector_kernels.packed_vector, types, {**constants, "UNROLL": unroll}, capability, loose=("lead",), num_warps=1,
        fuse=True,
    )  # fmt: skip


@every_pair
@pytest.mark.few(1)
@STACKED
@pytest.mark.parametrize("values", ["bf16", *CODES])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_kept_weight_takes_few_instructions(capability, values, stacked):
    found = walk(capability, values, vector_kernels.UNROLL, stacked)
    assert found.spilled_bytes == 0
    assert found.registers <= (56 if stacked else 48)  # with 64 all warps that a multiprocessor takes have room
    step = 32 // CODES.get(values, 8)  # codes of a word
    short, long = (walk(capability, values, unroll, stacked).num_instructions for unroll in (step, 2 * step))
    assert (long - short) / step <= 10
