"""Offsets of all kernels have 64 bits, but for products that something else keeps below 2**31."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

import triton
import triton.language as tl

from pst_ds.core.kernels.triton import (
    bit_kernels,
    cut_kernels,
    merge_kernels,
    score_kernels,
    unit_kernels,
    vector_kernels,
)

from .compiled import assembly
from .offsets import kernels_of, products_in_offsets

POSITION = "a weight, unit or key of one matrix, which has fewer than 2**31 (OwnKeys.fits)"
EDGE = "a row or column of one matrix"
FACTOR = "an element of a factor of one matrix: features times rank"
SMALL = "bits or bytes of one tile, word or row"
BOUNDED = {
    "row * width": POSITION,
    "row // UNIT_ROWS * (width // UNIT_COLS)": POSITION,
    "first * UNIT_ROWS * UNIT_COLS": POSITION,
    "first >> 3 << 3": POSITION,
    "(tl.program_id(0) - tl.load(starts_ptr + number).to(tl.int32)) * SIZE": POSITION,
    "tile * SIZE": POSITION,
    "across * COLS": EDGE,
    "across * down": EDGE,
    "(tile - across * down) * ROWS": EDGE,
    "tile // tl.load(table + TILES_DOWN).to(tl.int32) * COLS": EDGE,
    "tl.program_id(0) * ROWS": EDGE,
    "tl.program_id(1) * COLS": EDGE,
    "row * tl.load(table + 1).to(tl.int32)": FACTOR,
    "(first + more) * left_rank": FACTOR,
    "(first + more) * right_rank": FACTOR,
    "rank * left_rank": FACTOR,
    "rank * right_rank": FACTOR,
    "row * left_row": FACTOR,
    "k[None, :] * left_rank": FACTOR,
    "k[:, None] * right_rank": FACTOR,
    "col * right_col": FACTOR,
    "(row - first_row) * width": SMALL,
    "shard.to(tl.int32) * pad": SMALL,
    "(bits + (bits >> 4) & 252645135) * 16843009": SMALL,
    "(offset + lead & 3).to(tl.int32) * (8 // BITS)": SMALL,
    "end * BITS": SMALL,
    "at * 4": SMALL,
    "byte << 8 * more": SMALL,
}
"""Products that may have 32 bits, by their source, and what keeps them below 2**31."""

TABLE = {"table_ptr": "*i64", "starts_ptr": "*i64", "matrix_ptr": "*i32"}
SCORES = {**TABLE, **dict.fromkeys(("beta", "alpha1", "alpha2"), "fp32")}
BRACKETS = {**SCORES, "brackets_ptr": "*i32", "words_ptr": "*i32", "above_ptr": "*u8", "inside_ptr": "*u8"}
BRACKETS |= {"counts_ptr": "*i64"}
UNITS = {**SCORES, "slots_ptr": "*i64"}
CUTS = {"matrices_ptr": "*i32", "matrix_of_block_ptr": "*i32"}
KEYS = {**CUTS, "keys_ptr": "*i32", "index_ptr": "*i32"}
BITS = {"table_ptr": "*i64", "starts_ptr": "*i64", "mask_ptr": "*i32"}
SIZES = ("weight_row", "rows", "cols", "first", "width", "per_shard", "pad", "num_bytes", "left_row", "left_rank")
SIZES += ("right_rank", "right_col", "rank", "parts", "expert_step", "part_step", "left_step", "right_step")
MERGE = {"bits": "*u8", "beta": "fp32", **dict.fromkeys(("weight_ptr", "left", "right"), "*bf16")}
MERGE |= dict.fromkeys(SIZES, "i32")
OUTPUTS = ("grad", "merged", "scores", "updates")
GRADIENTS = {**MERGE, **{f"{name}_ptr": "*bf16" for name in OUTPUTS}, **{f"{name}_row": "i32" for name in OUTPUTS}}
GRADIENTS |= {"row_norms": "*fp32", "col_norms": "*fp32", "norm_step": "i32", "factor": "fp32"}
GRADIENTS |= {"factors_ptr": "*fp32", "ends_ptr": "*i32", "first_expert": "i32"}
PACKED = {"x_ptr": "*fp32", "x_vector": "i32", "experts_ptr": "*i64", "lead": "i32", "columns": "i32"}
PACKED |= {"offsets_ptr": "*i64", "bias_ptr": "*bf16", "y_ptr": "*bf16", "y_vector": "i32", "scales_ptr": "*bf16"}

FACTORS = {"TYPE": tl.bfloat16, "UPDATE_RANK": 9, "SCORE_RANK": 9, "TERMS": 15}
UNIT = {**FACTORS, "ALIGNED": False, "HALO": True, "ROWS": 32, "COLS": 32}
BLOCK = {**UNIT, "LOST": 0, "UNIT_ROWS": 16, "UNIT_COLS": 2}
GROUP = {**UNIT, "LOST": 2, "UNIT_ROWS": 1, "UNIT_COLS": 4}
WORDS = {**FACTORS, "WORD_BYTES": 4 * cut_kernels.WORDS}

# by name of the kernel: types of its arguments, constants; more than one where constants leave out some code
VARIANTS = {
    "bracket_rows": [
        (BRACKETS, {**WORDS, "ROWS": 32, "COLS": 64, "ALIGNED": aligned, "ALIGNED_WEIGHT": aligned})
        for aligned in (False, True)
    ],
    "bracket_flat": [
        (BRACKETS, {**WORDS, "SIZE": 256, "TYPE": dtype}) for dtype in (tl.bfloat16, tl.int32)
    ],
    "keys_at": [
        ({**UNITS, "limits_ptr": "*i32", "keys_ptr": "*i32", **index}, {**FACTORS, "SIZE": 256, **none})
        for index, none in (({"index_ptr": "*i32"}, {}), ({}, {"index_ptr": None}))
    ],
    "unit_keys": [({**UNITS, "keys_ptr": "*i32"}, constants) for constants in (BLOCK, GROUP)],
    "keep_n_of_m": [
        ({**UNITS, "bits_ptr": "*u8", "bad_ptr": "*i64", **units}, {**GROUP, **none})
        for units, none in (({"units_ptr": "*i64"}, {}), ({}, {"units_ptr": None}))
    ],
    "keep_in_rows": [
        (
            {**UNITS, "bits_ptr": "*u8", "bad_ptr": "*i64", "num_rows": "i32", "scratch_ptr": "*i32", "longest": "i32"},
            {**FACTORS, "ALIGNED": False, "HALO": True, "SIZE": 512},
        )
    ],
    "collect": [({**CUTS, "inside_ptr": "*i32", "index_ptr": "*i32"}, {})],
    "histogram": [({**KEYS, "lows_ptr": "*i64", "shift": "i32", "counts_ptr": "*i32"}, {"BINS": 2048})],
    "mark": [({**KEYS, **dict.fromkeys(("cuts_ptr", "above_ptr", "inside_ptr", "equal_ptr"), "*i32")}, {})],
    "finish": [
        ({**CUTS, **dict.fromkeys(("cuts_ptr", "equal_ptr", "inside_ptr", "above_ptr"), "*i32")}, {"STEP": 1024})
    ],
    "place": [
        (BITS, {"IN_ORDER": in_order, "UNIT_ROWS": 16, "UNIT_COLS": 2, "WORDS": 32}) for in_order in (False, True)
    ],
    "replace_bits": [({**BITS, "sums_ptr": "*i64"}, {"SIZE": 1024})],
    "merge": [
        ({**MERGE, "out_ptr": "*bf16", "out_row": "i32"}, {"ALIGNED": aligned, "RANK": 16, "ROWS": 32, "COLS": 128})
        for aligned in (False, True)
    ],
    "gradients": [(GRADIENTS, {"ALIGNED": False, "RANK": 16, "HAS_MAGNITUDE": True, "ROWS": 32, "COLS": 64})],
    "packed_vector": [
        (
            {**PACKED, "values_ptr": values, "bits_ptr": bits},
            {"UNROLL": 8, "BITS": size, "GROUP_WORDS": 2, "GROUPS": 64},
        )
        for values, size in (("*bf16", 0), ("*i8", 8), ("*u8", 4))
        for bits in ("*i32", "*u8")
    ],
}  # fmt: skip
KERNELS = kernels_of([bit_kernels, cut_kernels, merge_kernels, score_kernels, unit_kernels, vector_kernels])


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch):
    """Compile anew: Triton's cache returns what another clone compiled, with paths into that clone."""
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")


def test_every_kernel_is_compiled():
    assert KERNELS.keys() == VARIANTS.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_products_in_offsets_have_64_bits_or_are_bounded(name, tmp_path):
    """A product that is new here gets 64 bits, or its bound is added to BOUNDED."""
    found: set[str] = set()
    for types, constants in VARIANTS[name]:
        made = assembly(KERNELS[name], types, constants, 90, num_warps=1 if name == "packed_vector" else 4)
        found |= products_in_offsets(made.asm["ttir"], tmp_path)
    assert found - BOUNDED.keys() == set()


@triton.jit
def _example(values_ptr, numbers_ptr, n):
    number = tl.load(numbers_ptr)
    offset = number.to(tl.int64) * 7
    if number * 3 > n:
        offset += number * 5
    place = number
    for i in range(n):
        place = place * 11 + i
    tl.store(values_ptr + offset + place, number * 13)


def test_products_of_32_bits_are_found(tmp_path):
    """A product behind a widening, in what a loop carries, and in a branch; not one that is compared only."""
    types = {"values_ptr": "*i32", "numbers_ptr": "*i32", "n": "i32"}
    made = assembly(_example, types, {}, 90, loose=("n",))
    assert products_in_offsets(made.asm["ttir"], tmp_path) == {"number * 5", "place * 11"}
