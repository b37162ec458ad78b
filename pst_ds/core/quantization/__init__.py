"""Quantised weights: every kept weight is a small integer, its quantised value, times a scale shared by a group.

    w  ~  code * scale        code: -127 .. 127 (int8) or -7 .. 7 (int4); scale: bf16, one per group of inputs

The scheme is symmetric, without a zero point, so a pruned weight has code 0 and stays 0. Scales are rounded to bf16
before any weight is quantised, and ``code * scale`` is exact in fp32 (7 bits times 8), so every program that multiplies
the two gets the same weight. Scales are bf16 instead of fp16 because scales of small weights are far below the range of
fp16 (6e-5 without loss), and a scale needs at most 8 bits: codes are chosen for the rounded scale.

The code of a weight is ``w / scale``, divided in fp32, rounded half to even and limited to the largest code. The scale
of a group has the least squared error of those tried (:func:`~pst_ds.core.quantization.scales.search_scales`). The
search compares sums of integers, so the result depends only on the weights of the group, not on their order, the device
or the sharding.
"""

from pst_ds.core.quantization.coded import CodedRun, CodedWeight, CodeLayout, coded_run, weights_at
from pst_ds.core.quantization.grid import Grid, grid_of
from pst_ds.core.quantization.inputs import INPUT_BITS, InputGrid
from pst_ds.core.quantization.matrices import dequantize, first_off_grid, quantize, round_to_grid, squared_norms
from pst_ds.core.quantization.nibbles import pack_nibbles, unpack_nibbles
from pst_ds.core.quantization.scales import (
    LEAST_SCALE,
    SCALE_DTYPE,
    UNUSED_SCALE,
    first_bad_scale,
    group_losses,
    group_moments,
    group_scales,
    nearest_codes,
    require_scales,
    rounded_codes,
    search_scales,
    unit_of,
    whole_weights,
)
from pst_ds.core.quantization.stored import Rounding, StoredGrid, bytes_of_scales, scales_of_bytes
from pst_ds.core.quantization.tables import of_table_inputs, slice_numel, table_rows, times_table

__all__ = [
    "INPUT_BITS",
    "LEAST_SCALE",
    "SCALE_DTYPE",
    "UNUSED_SCALE",
    "CodeLayout",
    "CodedRun",
    "CodedWeight",
    "Grid",
    "InputGrid",
    "Rounding",
    "StoredGrid",
    "bytes_of_scales",
    "coded_run",
    "dequantize",
    "first_bad_scale",
    "first_off_grid",
    "grid_of",
    "group_losses",
    "group_moments",
    "group_scales",
    "nearest_codes",
    "of_table_inputs",
    "pack_nibbles",
    "quantize",
    "require_scales",
    "round_to_grid",
    "rounded_codes",
    "scales_of_bytes",
    "search_scales",
    "slice_numel",
    "squared_norms",
    "table_rows",
    "times_table",
    "unit_of",
    "unpack_nibbles",
    "weights_at",
    "whole_weights",
]
