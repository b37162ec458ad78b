"""Kernels of a mask update as a GPU would run them: registers, spills, and how products and sums are rounded."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

import triton.language as tl

from pst_ds.core.kernels.triton import bit_kernels, cut_kernels, score_kernels, unit_kernels
from pst_ds.core.kernels.triton.table import OwnUnits
from pst_ds.planning.time import UNIT_UPDATES

from .compiled import CAPABILITIES, compiled

TABLE = {"table_ptr": "*i64", "starts_ptr": "*i64", "matrix_ptr": "*i32"}
TABLE |= dict.fromkeys(("beta", "alpha1", "alpha2"), "fp32")
BITS = {"brackets_ptr": "*i32", "words_ptr": "*i32", "above_ptr": "*u8", "inside_ptr": "*u8", "counts_ptr": "*i64"}
WORD_BYTES = 4 * cut_kernels.WORDS


def scores(kernel, capability, types, rank=8, dtype=tl.bfloat16, **constants):
    """A kernel for a linear layer with all factors, of any matrices."""
    constants = {"TYPE": dtype, "UPDATE_RANK": rank, "SCORE_RANK": rank, "TERMS": 3, **constants}
    return compiled(kernel, {**TABLE, **types}, constants, capability)


def bracket_rows(capability, rank=8, dtype=tl.bfloat16, aligned=True):
    tile = {"ROWS": score_kernels.TILE_ROWS, "COLS": score_kernels.TILE_COLS, "WORD_BYTES": WORD_BYTES}
    alignment = {"ALIGNED": True, "ALIGNED_WEIGHT": aligned}
    return scores(score_kernels.bracket_rows, capability, BITS, rank, dtype, **tile, **alignment)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_pass_over_the_weights(capability):
    found = bracket_rows(capability)
    weights = score_kernels.TILE_ROWS * score_kernels.TILE_COLS // (4 * 32)  # of a thread
    assert (found.num_fused, found.num_flushing, found.spilled_bytes) == (0, 0, 0)
    assert found.registers <= 64
    assert found.num_instructions / weights <= 85
    assert found.count("LDG.E.128") >= 2 + 2 * 17  # weights, and V, B and C by eights
    assert found.count("FMUL", "FADD", "FMUL2", "FADD2") > 0


@pytest.mark.parametrize(
    ("rank", "dtype", "aligned"), [(4, tl.float32, True), (64, tl.float32, True), (8, tl.bfloat16, False)]
)
def test_other_ranks_and_shards_keep_in_registers(rank, dtype, aligned):
    found = bracket_rows(90, rank, dtype, aligned)
    assert (found.num_fused, found.num_flushing, found.spilled_bytes) == (0, 0, 0)
    assert found.registers <= 96


@pytest.mark.parametrize("capability", [90, 100])
def test_single_keys_round_as_the_pass_does(capability):
    size = {"SIZE": score_kernels.FLAT}
    keys = {"slots_ptr": "*i64", "limits_ptr": "*i32", "index_ptr": "*i32", "keys_ptr": "*i32"}
    for kernel, types, constants in (
        (score_kernels.bracket_flat, BITS, size | {"WORD_BYTES": WORD_BYTES}),
        (score_kernels.keys_at, keys, size),
    ):
        found = scores(kernel, capability, types, **constants)
        assert (found.num_fused, found.spilled_bytes) == (0, 0)  # a division of integers may flush


def unit_kernel(kernel, types, unit, lost=0, prune=0, dtype=tl.bfloat16):
    none = torch.empty(0)
    rows, cols = OwnUnits(unit, 0, 0, none, none, lost, prune).tile
    constants = {"ALIGNED": True, "HALO": True, "LOST": lost, "UNIT_ROWS": unit[0], "UNIT_COLS": unit[1]}
    return scores(kernel, 90, types, dtype=dtype, **constants, ROWS=rows, COLS=cols)


UNIT_KEYS = {"slots_ptr": "*i64", "keys_ptr": "*i32"}
GROUPS = {"slots_ptr": "*i64", "units_ptr": "*i64", "bits_ptr": "*u8", "bad_ptr": "*i64"}


@pytest.mark.parametrize("unit", [(16, 1), (1, 16), (4, 4), (64, 64), (1, 4), (16, 1, 8)], ids=str)
def test_units_keep_in_registers(unit):
    unit, lost = unit[:2], (unit[2:] or (2 if unit == (1, 4) else 0,))[0]
    made = [unit_kernel(unit_kernels.unit_keys, UNIT_KEYS, unit, lost)]
    if lost:
        made.append(unit_kernel(unit_kernels.keep_n_of_m, GROUPS, unit, lost))
    for found in made:
        assert (found.num_fused, found.num_flushing, found.spilled_bytes) == (0, 0, 0)
        assert found.registers <= (255 if unit == (64, 64) else 144)
    planned = {((16, 1), 0): "block", ((1, 4), 2): "n:m"}.get((unit, lost))
    if planned:
        weights = 1024 // (4 * 32)  # of a thread
        assert sum(found.num_instructions for found in made) / weights <= 1.01 * UNIT_UPDATES[planned][1]


def test_rows_keep_in_registers():
    types = {"num_rows": "i32", "scratch_ptr": "*i32", "longest": "i32", "slots_ptr": "*i64", "bits_ptr": "*u8"}
    constants = {"ALIGNED": True, "HALO": True, "SIZE": unit_kernels.ROW_SIZE}
    found = scores(unit_kernels.keep_in_rows, 90, {**types, "bad_ptr": "*i64"}, **constants)
    assert (found.num_fused, found.num_flushing, found.spilled_bytes) == (0, 0, 0)
    assert found.registers <= 96


def test_cuts_and_sums_of_bits():
    tables = {"matrices_ptr": "*i32", "matrix_of_block_ptr": "*i32"}
    keys = {"keys_ptr": "*i32", "index_ptr": "*i32", "cuts_ptr": "*i32", "inside_ptr": "*i32", "above_ptr": "*i32"}
    for kernel, types, constants in (
        (cut_kernels.collect, {"inside_ptr": "*i32", "index_ptr": "*i32"}, {}),
        (
            cut_kernels.histogram,
            {"keys_ptr": "*i32", "index_ptr": "*i32", "lows_ptr": "*i64", "shift": "i32", "counts_ptr": "*i32"},
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
    tables = {"table_ptr": "*i64", "starts_ptr": "*i64", "mask_ptr": "*i32"}
    unit = {"UNIT_ROWS": 16, "UNIT_COLS": 1, "WORDS": bit_kernels.WORDS}
    for kernel, types, constants in (
        (bit_kernels.place, {}, {"IN_ORDER": True, **unit}),
        (bit_kernels.place, {}, {"IN_ORDER": False, **unit}),
        (bit_kernels.replace_bits, {"sums_ptr": "*i64"}, {"SIZE": bit_kernels.SIZE}),
    ):
        found = compiled(kernel, {**tables, **types}, constants, 90)
        assert found.spilled_bytes == 0
        assert found.registers <= 96
