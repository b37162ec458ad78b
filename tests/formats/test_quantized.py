"""Codes and scales under a bitmask, as 2:4 and dense: layouts against loops written out, sizes, round trips."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.core.quantization import Grid, dequantize, quantize, round_to_grid
from pst_ds.formats import FormatError, QuantizedFormat, row_bits, stored_bits
from pst_ds.formats.rows import row_counts
from pst_ds.storage_format import packed_format
from tests.pairs import every_pair

from .test_sparse import nbytes

PACKINGS = ["bitmask", "2:4", "dense"]
GRIDS = [Grid(8), Grid(8, 32), Grid(4), Grid(4, 32)]
CASES = [(packing, grid) for packing in PACKINGS for grid in GRIDS]


def bits_of(keep):
    return torch.from_numpy(np.packbits(keep, axis=1, bitorder="little"))


def kept_at_random(shape, packing, density, seed):
    generator = np.random.default_rng(seed)
    keep = generator.random(shape) < density
    if packing == "2:4":
        keep &= (np.cumsum(keep.reshape(shape[0], -1, 4), axis=2) <= 2).reshape(shape)
    return keep


def written_out(codes, keep, bits):
    """The bytes of "codes" row by row, by loops: codes of kept positions, int4 ones in pairs from the lower half."""
    out = []
    for row in range(codes.shape[0]):
        held = [int(code) for code, kept in zip(codes[row], keep[row], strict=True) if kept]
        if bits == 8:
            out += [code % 256 for code in held]
            continue
        held += [0] * (len(held) % 2)
        out += [low % 16 + 16 * (high % 16) for low, high in zip(held[::2], held[1::2], strict=True)]
    return out


def filled(keep):
    """2:4 fills a group up with its lowest free positions."""
    full = keep.copy()
    for row, start in np.ndindex(keep.shape[0], keep.shape[1] // 4):
        group = full[row, 4 * start : 4 * start + 4]
        for at in range(4):
            if group.sum() < 2:
                group[at] = True
    return full


@pytest.mark.parametrize(("packing", "grid"), CASES, ids=str)
@given(st.integers(1, 5), st.sampled_from([32, 64, 96, 160]), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 99))
def test_parts_are_those_of_the_description(packing, grid, rows, columns, density, seed):
    if grid.group is None and packing != "2:4":
        columns -= 3  # rows that end within a byte
    keep = kept_at_random((rows, columns), packing, density, seed)
    weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns))).float()
    weight[0, -1], keep[0, -1] = 0.0, keep[0, -1]
    form = packed_format(packing, grid)
    parts = form.pack(weight, bits_of(keep), "w")
    assert form.check("w", parts, (rows, columns)) == (rows, columns)
    codes, scales = quantize(weight, torch.from_numpy(keep), grid)
    held = {"bitmask": keep, "2:4": filled(keep), "dense": np.ones_like(keep)}[packing]
    assert parts["codes"].view(torch.uint8).flatten().tolist() == written_out(codes, held, grid.bits)
    assert parts["scales"].dtype == torch.bfloat16
    assert torch.equal(parts["scales"], scales)
    assert parts["shape"].flatten().tolist() == [rows, columns]
    if packing != "dense":
        assert torch.equal(parts["bitmask"], bits_of(held))
    expected = form.parts((rows, columns), form.stored(torch.from_numpy(keep.sum(1))), torch.bfloat16)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in parts.items()} == expected
    assert list(parts) == list(form.part_names)
    assert torch.equal(form.unpack(parts), dequantize(codes, scales))
    assert torch.equal(form.unpack(parts, torch.bfloat16), dequantize(codes, scales, torch.bfloat16))
    assert not torch.signbit(form.unpack(parts)[~torch.from_numpy(keep)]).any()


@pytest.mark.parametrize(("packing", "grid"), CASES, ids=str)
def test_packing_again_with_the_same_scales_changes_nothing(packing, grid):
    keep = kept_at_random((6, 64), packing, 0.4, 1)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    form = packed_format(packing, grid)
    parts = form.pack(weight, bits_of(keep), "w")
    for dtype in (torch.float32, torch.bfloat16):
        again = form.pack_codes(*quantize(form.unpack(parts, dtype), None, grid, parts["scales"]), bits_of(keep))
        assert all(torch.equal(again[name], part) for name, part in parts.items())


def test_values_under_zeros_are_not_looked_at():
    keep = kept_at_random((4, 64), "bitmask", 0.5, 3)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    odd = torch.where(torch.from_numpy(keep), weight, float("nan"))
    for packing in ("bitmask", "dense"):
        form = packed_format(packing, Grid(4, 64))
        parts, clean = (form.pack(w, bits_of(keep)) for w in (odd, weight))
        assert all(torch.equal(parts[name], part) for name, part in clean.items())


def test_non_zeros_are_kept_where_nothing_says_what_is():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight[:, ::3] = 0.0
    form = packed_format("bitmask", Grid(8))
    parts = form.pack(weight)
    assert torch.equal(parts["bitmask"], row_bits(weight))
    assert torch.equal(form.unpack(parts), round_to_grid(weight, None, Grid(8)))


@every_pair
@pytest.mark.parametrize(("packing", "grid"), CASES, ids=str)
@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0)])
def test_empty_matrices(packing, grid, shape):
    form = packed_format(packing, grid)
    parts = form.pack(torch.empty(shape))
    assert form.check("w", parts) == shape
    assert form.unpack(parts).shape == shape


@every_pair
@pytest.mark.parametrize("columns", [1536, 4096])
@pytest.mark.parametrize(
    ("grid", "most"),
    [(Grid(8), {0.5: 5.05, 0.8: 2.37, 0.9: 1.32}), (Grid(4, 64), {0.5: 3.28, 0.8: 1.81, 0.9: 1.16})],
    ids=str,
)
def test_bits_a_weight(grid, most, columns):
    """Everything counted: bits as files have them, codes, scales, the shape. Rows are odd and even."""
    form, rng, shape = packed_format("bitmask", grid), np.random.default_rng(0), (512, columns)
    for zeros, bits in most.items():
        keep = bits_of(rng.random(shape) >= zeros)
        size = nbytes(form, shape, form.stored(row_counts(keep))) - keep.numel() + stored_bits(keep).numel()
        assert size / keep.numel() <= bits
    assert 8 * nbytes(packed_format("dense", Grid(4, 128)), (4096, 4096), 0) / 4096**2 < 4.13


def test_what_an_export_of_an_encoder_weighs():
    """A MiniLM-L6 of 384 inputs, 90 % zeros: embeddings of 30,522 rows, six layers."""

    def encoder(grid, table_grid):
        layers = 6 * [(384, 384)] * 4 + 6 * [(1536, 384), (384, 1536)]
        form, table = packed_format("bitmask", grid), packed_format("dense", table_grid)
        sizes = [nbytes(form, (o, i), form.stored(torch.full((o,), round(0.1 * i)))) for o, i in layers]
        weights = sum(o * i for o, i in layers)
        bits = bits_of(np.random.default_rng(0).random((384, 1536)) < 0.1)
        saved = weights / 8 * (1 - stored_bits(bits).numel() / bits.numel())
        return sum(sizes) - saved + nbytes(table, (30522, 384), 0)

    assert encoder(Grid(8), Grid(8)) < 13.6e6
    assert encoder(Grid(4, 64), Grid(4, 64)) < 7.75e6


def test_what_there_is_not():
    with pytest.raises(ValueError, match="quantised values are packed as bitmask, 2:4, dense, not as csr"):
        packed_format("csr", Grid(8))
    with pytest.raises(ValueError, match="packed formats are bitmask, 2:4, csr, not dense"):
        packed_format("dense")
    with pytest.raises(FormatError, match="groups of 64 do not divide 96 inputs; take 32 or row"):
        packed_format("bitmask", Grid(4, 64)).parts((2, 96), 4, torch.bfloat16)
    with pytest.raises(FormatError, match=r"^w: a weight of rows 0 to 1 is not finite"):
        packed_format("bitmask", Grid(8)).pack(torch.full((2, 4), math.inf), None, "w")
    assert isinstance(packed_format("dense", Grid(8)), QuantizedFormat)
    assert packed_format("bitmask").name == "bitmask"
