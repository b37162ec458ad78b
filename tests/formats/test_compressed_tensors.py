"""The layouts of compressed-tensors: against numpy, against the library if it is there, damaged."""

import numpy as np
import pytest
import torch

from pst_ds.core.quantization import Grid, dequantize, quantize
from pst_ds.formats import FormatError
from pst_ds.storage_format import packed_format
from tests.pairs import every_pair

GRIDS = [Grid(8), Grid(8, 32), Grid(4), Grid(4, 32)]


def made(grid, shape=(5, 64), seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight[:, ::3] = 0.0
    return weight, packed_format("compressed-tensors", grid).pack(weight)


def by_numpy(parts, bits):
    """Codes of the description: unsigned, side by side from the lowest bit of each word on."""
    rows, columns = parts["weight_shape"].tolist()
    words = parts["weight_packed"].numpy().view(np.uint32).astype(np.uint64)
    shifts = np.arange(0, 32, bits, dtype=np.uint64)
    raw = (words[:, :, None] >> shifts & np.uint64(2**bits - 1)).reshape(rows, -1)
    assert not raw[:, columns:].any()
    return raw[:, :columns].astype(np.int64) - 2 ** (bits - 1)


@every_pair
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("columns", [32, 64, 96, 37])
def test_words_are_those_of_the_description(grid, columns):
    if grid.group and columns % grid.group:
        return
    form = packed_format("compressed-tensors", grid)
    weight, parts = made(grid, (5, columns))
    codes, scales = quantize(weight, None, grid)
    assert np.array_equal(by_numpy(parts, grid.bits), codes.numpy())
    assert torch.equal(parts["weight_scale"], scales)
    assert form.check("w", parts, (5, columns)) == (5, columns)
    assert torch.equal(form.unpack_codes(parts), codes)
    assert torch.equal(form.unpack(parts), dequantize(codes, scales))
    sizes = form.parts((5, columns), 0, torch.bfloat16)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == sizes


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_library_reads_them(grid):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    weight, parts = made(grid)
    codes, _ = quantize(weight, None, grid)
    assert torch.equal(helpers.pack_to_int32(codes, grid.bits), parts["weight_packed"])
    assert torch.equal(helpers.unpack_from_int32(parts["weight_packed"], grid.bits, weight.shape), codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda parts: parts.pop("weight_scale"),
            "must have the parts weight_packed, weight_scale, weight_shape, found",
        ),
        (lambda parts: parts.update(weight_shape=torch.tensor([5.0, 64.0])), "weight_shape must be int64"),
        (lambda parts: parts.update(weight_shape=torch.tensor([-5, 64])), "no matrix has the shape"),
        (lambda parts: parts.update(weight_shape=torch.tensor([5, 96])), "weight_packed of a 5 x 96 matrix"),
        (lambda parts: parts.update(weight_packed=parts["weight_packed"].short()), "weight_packed must be torch.int32"),
        (lambda parts: parts["weight_scale"][3].fill_(0.0), "weight_scale 3 is 0; scales are at least"),
        (lambda parts: parts["weight_scale"][3].fill_(float("nan")), "weight_scale 3 is nan"),
    ],
)
def test_each_rule_broken_once_is_refused_by_name(change, message):
    form = packed_format("compressed-tensors", Grid(4))
    _, parts = made(Grid(4))
    change(parts)
    with pytest.raises(FormatError, match=f"^w: .*{message}"):
        form.check("w", parts)


def test_bits_beyond_a_row():
    form = packed_format("compressed-tensors", Grid(8))
    _, parts = made(Grid(8), (3, 37))
    parts["weight_packed"][1, -1] |= 1 << 30
    with pytest.raises(FormatError, match="weight_packed has a bit beyond its codes in row 1"):
        form.check("w", parts)
    parts["weight_packed"][0].zero_()
    with pytest.raises(FormatError, match="weight_packed has the code -128 in row 0"):
        form.check("w", parts)
    with pytest.raises(FormatError, match=r"its shape is \(3, 37\), but must be \(37, 3\)"):
        form.check("w", made(Grid(8), (3, 37))[1], (37, 3))


def of_int8(shape=(5, 64)):
    weight = made(Grid(8), shape)[0]
    return weight, packed_format("compressed-tensors-w8a8", Grid(8)).pack(weight)


@pytest.mark.parametrize("columns", [64, 37])
def test_int8_codes_as_they_are(columns):
    form = packed_format("compressed-tensors-w8a8", Grid(8))
    weight, parts = of_int8((5, columns))
    codes, scales = quantize(weight, None, Grid(8))
    assert list(parts) == ["weight", "weight_scale"]
    assert torch.equal(parts["weight"], codes)
    assert torch.equal(parts["weight_scale"], scales)
    assert form.check("w", parts, (5, columns)) == (5, columns)
    assert torch.equal(form.unpack(parts), dequantize(codes, scales))
    sizes = form.parts((5, columns), 0, torch.bfloat16)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == sizes


@pytest.mark.parametrize("grid", [Grid(8, 32), Grid(4)], ids=str)
def test_inputs_of_8_bits_go_with_whole_rows_of_int8(grid):
    with pytest.raises(ValueError, match="int8 values with per-row scales, not"):
        packed_format("compressed-tensors-w8a8", grid)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("weight"), "must have the parts weight, weight_scale, found weight_scale"),
        (lambda parts: parts.update(weight=parts["weight"].flatten()), r"must be a matrix, but has the shape \(320,\)"),
        (lambda parts: parts.update(weight=parts["weight"].float()), "weight must be torch.int8, found"),
        (
            lambda parts: parts.update(weight_scale=parts["weight_scale"][:4]),
            r"must be torch.bfloat16 of shape \(5, 1\)",
        ),
        (lambda parts: parts["weight"][2, 7].fill_(-128), "weight has the code -128 in row 2"),
        (lambda parts: parts["weight_scale"][3].fill_(float("inf")), "weight_scale 3 is inf; scales are at least"),
    ],
)
def test_each_rule_of_int8_broken_once_is_refused_by_name(change, message):
    _, parts = of_int8()
    change(parts)
    with pytest.raises(FormatError, match=f"^w: .*{message}"):
        packed_format("compressed-tensors-w8a8", Grid(8)).check("w", parts)


def test_int8_codes_of_another_shape_than_the_model_has():
    with pytest.raises(FormatError, match=r"its shape is \(5, 64\), but must be \(64, 5\)"):
        packed_format("compressed-tensors-w8a8", Grid(8)).check("w", of_int8()[1], (64, 5))
