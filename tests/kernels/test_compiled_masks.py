"""Kernels of a mask update as a GPU would run them: registers, spills, and how products and sums are rounded."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from pst_ds.core.kernels.triton import bit_kernels, cut_kernels, score_kernels

from .compiled import CAPABILITIES, compiled

NAMES = ("update_left", "update_right", "score_left", "score_right", "score_rows", "score_cols")
FACTORS = dict.fromkeys(NAMES, "*fp32")
STRIDES = dict.fromkeys(("update_left_row", "update_right_rank", "score_left_row", "score_right_rank"), "i32")
NUMBERS = dict.fromkeys(("beta", "factor", "alpha1", "alpha2"), "fp32")
OF_A_LINEAR = {"update_left_rank": 1, "score_left_rank": 1, "row_norms": None, "col_norms": None}
OUTPUTS = {"bracket": "*i32", "above_ptr": "*u8", "inside_ptr": "*u8", "counts_ptr": "*i64"}
LOOSE = ("update_left_row", "score_left_row", "row0", "base", "first")


def scores(kernel, capability, rank, types, **constants):
    types = {**FACTORS, **STRIDES, **NUMBERS, **types}
    constants = {**OF_A_LINEAR, "UPDATE_RANK": rank, "SCORE_RANK": rank, **constants}
    return compiled(kernel, types, constants, capability, loose=LOOSE)


def bracket_rows(capability, rank=8, dtype="bf16"):
    types = {"weight_ptr": f"*{dtype}", **dict.fromkeys(("row0", "lead", "count", "rows", "cols"), "i32"), **OUTPUTS}
    rows, cols = score_kernels.TILE_ROWS, score_kernels.TILE_COLS
    return scores(score_kernels.bracket_rows, capability, rank, types, ROWS=rows, COLS=cols)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_pass_over_the_weights(capability):
    found = bracket_rows(capability)
    weights = score_kernels.TILE_ROWS * score_kernels.TILE_COLS // (4 * 32)  # of a thread
    assert (found.num_fused, found.num_flushing, found.spilled_bytes) == (0, 0, 0)
    assert found.registers <= 64
    assert found.num_instructions / weights <= 85
    assert found.count("LDG.E.128") >= 2 + 2 * 17  # weights, and V, B and C by eights
    assert found.count("FMUL", "FADD", "FMUL2", "FADD2") > 0


@pytest.mark.parametrize("rank", [4, 64])
def test_other_ranks_keep_in_registers(rank):
    found = bracket_rows(90, rank, "fp32")
    assert (found.num_fused, found.num_flushing, found.spilled_bytes) == (0, 0, 0)
    assert found.registers <= 96


@pytest.mark.parametrize("capability", [90, 100])
def test_single_keys_round_as_the_pass_does(capability):
    at = {"first": "i32", "count": "i32", "width": "i32", "row_length": "i32", "offset": "i32", "weight_ptr": "*bf16"}
    positions = {"positions_ptr": "*i32", "num_positions": "i32", "limit_ptr": "*i32", "base": "i32"}
    flat = scores(score_kernels.bracket_flat, capability, 8, {**at, **OUTPUTS}, SIZE=score_kernels.FLAT)
    single = scores(
        score_kernels.keys_at, capability, 8, {**at, **positions, "keys_ptr": "*i32"}, SIZE=score_kernels.FLAT
    )
    for found in (flat, single):
        assert (found.num_fused, found.spilled_bytes) == (0, 0)  # a division of integers may flush


def test_cuts_and_sums_of_bits():
    tables = {"matrices_ptr": "*i32", "matrix_of_block_ptr": "*i32"}
    keys = {"keys_ptr": "*i32", "index_ptr": "*i32", "cuts_ptr": "*i32", "inside_ptr": "*i32", "above_ptr": "*i32"}
    for kernel, types, constants in (
        (cut_kernels.collect, {"inside_ptr": "*i32", "index_ptr": "*i32"}, {}),
        (
            cut_kernels.histogram,
            {"keys_ptr": "*i32", "lows_ptr": "*i64", "shift": "i32", "counts_ptr": "*i32"},
            {"BINS": 2048},
        ),
        (cut_kernels.mark, {**keys, "equal_ptr": "*i32"}, {}),
        (
            cut_kernels.finish,
            {"cuts_ptr": "*i32", "equal_ptr": "*i32", "inside_ptr": "*i32", "above_ptr": "*i32"},
            {"STEP": 1024},
        ),
    ):
        found = compiled(kernel, {**tables, **types}, constants, 90, loose=("shift",))
        assert found.spilled_bytes == 0
        assert found.registers <= 96
    types = {"before_ptr": "*u8", "after_ptr": "*u8", "out_ptr": "*i64"}
    types |= dict.fromkeys(("count", "lead", "first_byte", "seed"), "i64")
    found = compiled(bit_kernels.sum_bits, types, {"SIZE": bit_kernels.SIZE}, 90, loose=tuple(types))
    assert found.spilled_bytes == 0
    assert found.registers <= 64
