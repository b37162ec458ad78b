"""The merge and the backward pass's kernel as a GPU would run them: registers, spills, and bytes a weight."""

from __future__ import annotations

import pytest

from tests.pairs import every_pair

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.core.kernels.triton import merge_kernels as kernels

from .compiled import CAPABILITIES, compiled

SIZES = (
    "weight_row", "rows", "cols", "first", "width", "per_shard", "pad", "num_bytes", "left_row", "right_rank", "rank",
)  # fmt: skip
STEPS = ("parts", "expert_step", "part_step", "left_step", "right_step")
MERGED = {"bits": "*u8", "beta": "fp32", **dict.fromkeys(("weight_ptr", "left", "right"), "*bf16")}
MERGED |= dict.fromkeys(SIZES, "i32")
CONSTANTS = {"left_rank": 1, "right_col": 1, "RANK": kernels.LEAST_RANK}
LOOSE = ("rank", "left_row", "per_shard", "pad", "num_bytes", "parts")
each_form = pytest.mark.parametrize(
    ("aligned", "is_stack"), [(True, False), (False, False), (False, True)], ids=["512 ranks", "504 ranks", "experts"]
)


def of_matrices(types, constants, *, is_stack):
    """With the steps between the matrices of a stack, or without."""
    return (types | dict.fromkeys(STEPS, "i32"), constants) if is_stack else (types, constants | dict.fromkeys(STEPS))


@every_pair
@each_form
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_merge_is_one_pass(capability, aligned, is_stack):
    tile = {"ROWS": kernels.TILE_ROWS, "COLS": kernels.TILE_COLS}
    types = {**MERGED, "out_ptr": "*bf16", "out_row": "i32"}
    types, constants = of_matrices(types, {**CONSTANTS, **tile, "ALIGNED": aligned}, is_stack=is_stack)
    found = compiled(kernels.merge, types, constants, capability, loose=LOOSE, fuse=True)
    assert found.spilled_bytes == 0
    assert found.registers <= (64 if aligned else 66 + 6 * is_stack)
    weights = kernels.TILE_ROWS * kernels.TILE_COLS // (4 * 32)  # of a thread
    assert found.count("LDG.E.128") >= weights // 8  # eight at a time
    assert found.count("STG.E.128") == weights // 8  # and each is written once: 2 + 1/8 + 2 bytes a weight
    assert found.count("HMMA", "HGMMA", "UTCHMMA") > 0


@every_pair
@each_form
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_what_is_made_of_a_gradient_is_one_pass(capability, aligned, is_stack):
    tile = {"ROWS": kernels.GRADIENT_ROWS, "COLS": kernels.GRADIENT_COLS}
    outputs = ("merged", "scores", "updates")
    types = {**MERGED, **dict.fromkeys((f"{name}_ptr" for name in ("grad", *outputs)), "*bf16"), "factor": "fp32"}
    types |= dict.fromkeys((f"{name}_row" for name in ("grad", *outputs)), "i32")
    types |= {"factors_ptr": "*fp32", "ends_ptr": "*i32"} if is_stack else {}
    constants = {**CONSTANTS, **tile, "ALIGNED": aligned, "HAS_MAGNITUDE": True, "norm_step": 0, "first_expert": 0}
    constants |= dict.fromkeys(("row_norms", "col_norms", *(() if is_stack else ("factors_ptr", "ends_ptr"))))
    types, constants = of_matrices(types, constants, is_stack=is_stack)
    found = compiled(kernels.gradients, types, constants, capability, loose=LOOSE, fuse=True)
    assert found.spilled_bytes == 0
    assert found.registers <= 128
    weights = kernels.GRADIENT_ROWS * kernels.GRADIENT_COLS // (4 * 32)
    # G, W0 and a bit are read, three are written, and four skinny products read dS and dW twice each: 18.1 bytes
    assert found.count("LDG.E.128") >= 2 * weights // 8
    assert found.count("STG.E.128") == 3 * weights // 8
