"""Grids, codes and scales, against numpy and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pst_ds.core import quantization
from pst_ds.core.quantization import (
    Grid,
    dequantize,
    first_bad_scale,
    first_off_grid,
    grid_of,
    group_scales,
    nearest_codes,
    pack_nibbles,
    quantize,
    round_to_grid,
    search_scales,
    unit_of,
    unpack_nibbles,
)
from tests.pairs import every_pair

RANGES = {8: (-127, 127), 4: (-8, 7)}
"""Smallest and largest codes."""
GRIDS = [Grid(bits, group) for bits in (8, 4) for group in (None, 32, 64, 128)]
INT4 = Grid(4, 64)


def weights(seed: int = 0, shape: tuple[int, int] = (12, 256), zeros: float = 0.5) -> torch.Tensor:
    """Normal weights, of a size of its own in each row, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) * 0.1
    return torch.where(torch.rand(shape, generator=generator) < zeros, 0.0, weight)


def bf16_of(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32).to(torch.bfloat16))


def rounded_by_numpy(weight: np.ndarray, scale: float, grid: Grid) -> np.ndarray:
    """np.rint is half to even, as IEEE has it."""
    return np.clip(np.rint(weight.astype(np.float32) / np.float32(scale)), *RANGES[grid.bits])


def squared_error(weight: np.ndarray, scale: float, grid: Grid) -> Fraction:
    codes = rounded_by_numpy(weight, scale, grid)
    return sum(
        ((Fraction(float(w)) - int(c) * Fraction(scale)) ** 2 for w, c in zip(weight, codes, strict=True)), Fraction(0)
    )


@every_pair
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_error_is_never_above_plain_rounding_of_the_largest_magnitude(grid, dtype):
    weight = weights().to(dtype)
    codes, scales = quantize(weight, None, grid)
    rounded, length = dequantize(codes, scales, torch.float64), 256 // grid.num_groups(256)
    for row, group in np.ndindex(12, grid.num_groups(256)):
        columns = slice(group * length, (group + 1) * length)
        held = weight[row, columns].double().numpy()
        plain = squared_error(held, bf16_of(float(np.float32(abs(held).max()) / np.float32(grid.largest))), grid)
        ours = sum(
            (Fraction(float(w)) - Fraction(float(r))) ** 2 for w, r in zip(held, rounded[row, columns], strict=True)
        )
        assert ours <= plain * Fraction(10**6 + 1, 10**6)  # weights are compared in units of 2^-28 of the largest


@every_pair
@pytest.mark.parametrize("grid", [Grid(8), Grid(4)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_scale_is_the_best_of_those_tried(grid, seed):
    held = weights(seed, (1, 64), zeros=0.3)
    row = held[0].numpy()
    extreme = row[np.abs(row).argmax()]
    numerator = np.abs(extreme) if grid.bits == 8 else -extreme  # whose code is -8, if it has one beyond 7
    tried = [bf16_of(float(numerator / np.float32(d))) for d in (grid.largest, *quantization._DIVISORS[grid.bits])]
    best = min(tried, key=lambda scale: squared_error(row, scale, grid))
    for _ in range(2):
        codes = rounded_by_numpy(row, best, grid)
        fitted = sum(Fraction(float(w)) * int(c) for w, c in zip(row, codes, strict=True)) / int((codes**2).sum())
        best = min(best, bf16_of(float(fitted)), key=lambda scale: squared_error(row, scale, grid))
    assert float(quantize(held, None, grid)[1]) == best


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_are_those_of_numpy_and_products_are_exact(grid):
    weight = weights(3)
    codes, scales = quantize(weight, None, grid)
    wide = np.repeat(scales.float().numpy(), 256 // scales.shape[1], axis=1)
    np.testing.assert_array_equal(codes.numpy(), rounded_by_numpy(weight.numpy(), wide, grid))
    assert (int(codes.min()), int(codes.max())) == RANGES[grid.bits]
    exact = codes.double().numpy() * wide.astype(np.float64)
    np.testing.assert_array_equal(dequantize(codes, scales).double().numpy(), exact)
    torch.testing.assert_close(
        dequantize(codes, scales, torch.bfloat16), torch.from_numpy(exact).bfloat16(), rtol=0, atol=0
    )


@every_pair
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_again_with_the_same_scales_changes_nothing(grid, dtype):
    codes, scales = quantize(weights(5), None, grid)
    again, same = quantize(dequantize(codes, scales, dtype), None, grid, scales)
    assert torch.equal(again, codes)
    assert torch.equal(same, scales)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weights_on_a_grid_that_use_its_largest_code_stay_as_they_are(grid):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-grid.largest, grid.largest + 1, (8, 128), generator=generator, dtype=torch.int8)
    codes[:, :: 128 // grid.num_groups(128)] = grid.largest
    scales = (torch.rand(8, grid.num_groups(128), generator=generator) * 0.01 + 1e-4).bfloat16()
    weight = dequantize(codes, scales)
    assert torch.equal(round_to_grid(weight, None, grid), weight)


@given(
    hnp.arrays(np.float32, (2, 64), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    st.sampled_from([Grid(8), Grid(8, 32), Grid(4), Grid(4, 64)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_finite_weights_have_finite_scales_and_products(values, grid, dtype):
    weight = torch.from_numpy(values).to(dtype)
    weight = torch.where(torch.isfinite(weight), weight, 0)
    codes, scales = quantize(weight, None, grid)
    assert first_bad_scale(scales, grid) is None
    assert RANGES[grid.bits][0] <= int(codes.min()) <= int(codes.max()) <= RANGES[grid.bits][1]
    for out in (torch.float32, torch.bfloat16):
        rounded = dequantize(codes, scales, out)
        assert torch.isfinite(rounded).all()
        assert not torch.signbit(rounded[codes == 0]).any()
        assert (codes[weight == 0] == 0).all()


def test_largest_numbers_of_fp16_stay_finite_in_it():
    weight = torch.full((1, 32), torch.finfo(torch.float16).max, dtype=torch.float16)
    for grid in (Grid(8), Grid(4)):
        assert torch.isfinite(round_to_grid(weight, None, grid)).all()


def test_scales_do_not_depend_on_order_or_shards():
    grouped = weights(1, (40, 64), zeros=0.2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    for grid in (Grid(8), Grid(4)):
        scales = group_scales(grouped, grid)
        assert torch.equal(group_scales(grouped[:, order].contiguous(), grid), scales)
        extremes = grouped.gather(1, grouped.abs().argmax(1, keepdim=True)).flatten()
        whole = (grouped.double() / unit_of(extremes)[:, None]).round()

        def summed(tried, grid=grid, whole=whole):
            codes = nearest_codes(grouped, tried[:, None], grid).double()
            cut = [slice(0, 7), slice(7, 8), slice(8, 64)]
            return sum((whole * codes)[:, c].sum(1) for c in cut), sum((codes * codes)[:, c].sum(1) for c in cut)

        assert torch.equal(search_scales(extremes, summed, grid), scales)


def test_pruned_weights_have_code_0_and_no_say_in_the_scale():
    weight = weights(7, zeros=0.0)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    odd = torch.where(keep, weight, torch.tensor([float("nan"), float("inf"), 1e30, -1e30]).repeat(12, 64))
    for grid in GRIDS:
        codes, scales = quantize(odd, keep, grid)
        plain = quantize(weight * keep, None, grid)
        assert torch.equal(codes, plain[0])
        assert torch.equal(scales, plain[1])
        assert not codes[~keep].any()


def test_a_group_without_weights_has_scale_1():
    weight = weights(zeros=0.0)
    weight[3], weight[5, 64:128] = 0.0, -0.0
    codes, scales = quantize(weight, None, INT4)
    assert scales[3].tolist() == [1, 1, 1, 1]
    assert scales[5, 1] == 1
    assert not codes[5, 64:128].any()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_empty_matrices(shape):
    codes, scales = quantize(torch.empty(shape), None, Grid(4, 32))
    assert codes.shape == shape
    assert scales.shape == (shape[0], shape[1] // 32)
    assert dequantize(codes, scales).shape == shape


def test_bands_do_not_show(monkeypatch):
    weight = weights(2, (30, 128))
    codes, scales = quantize(weight, weight > 0, INT4)
    monkeypatch.setattr(quantization, "_AT_A_TIME", {"cpu": 300})
    again = quantize(weight, weight > 0, INT4)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)
    assert torch.equal(dequantize(*again), dequantize(codes, scales))


@given(hnp.arrays(np.int8, hnp.array_shapes(min_dims=1, max_dims=2, max_side=9), elements=st.integers(-8, 7)))
def test_nibbles(codes):
    packed = pack_nibbles(torch.from_numpy(codes))
    count = codes.shape[-1]
    assert packed.shape == (*codes.shape[:-1], (count + 1) // 2)
    assert packed.dtype == torch.uint8
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, count % 2)]).astype(np.int64) % 16
    np.testing.assert_array_equal(packed.numpy(), padded[..., ::2] + 16 * padded[..., 1::2])
    np.testing.assert_array_equal(unpack_nibbles(packed, count).numpy(), codes)


def test_names_of_grids():
    assert grid_of("int8") == Grid(8)
    assert grid_of("int4") == Grid(4, 64)
    assert grid_of("int8", 32) == Grid(8, 32)
    assert grid_of("int4", "row") == Grid(4)
    assert grid_of("int4", "128") == Grid(4, 128)
    assert [str(grid) for grid in (Grid(8), INT4)] == ["int8, a scale for every row", "int4, a scale for 64 inputs"]
    assert (Grid(8).largest, Grid(4).largest) == (127, 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Grid(3), "values have 8 or 4 bits, got 3"),
        (lambda: Grid(True), "values have 8 or 4 bits, got True"),
        (lambda: Grid(4, 48), "a group has 32, 64, 128 inputs or is a whole row, got 48"),
        (lambda: grid_of("int5"), "quantised values are int8 or int4, got 'int5'"),
        (lambda: grid_of("int4", 48), "a group is 32, 64, 128 or row, got 48"),
        (lambda: Grid(4, 64).num_groups(96), "groups of 64 do not divide 96 inputs; take 32 or row"),
        (lambda: quantize(torch.ones(2, 33), None, Grid(8, 32)), "groups of 32 do not divide 33 inputs; take row"),
        (lambda: quantize(torch.tensor([[float("nan")]]), None, Grid(8)), "rows 0 to 0 is not finite"),
        (lambda: quantize(torch.tensor([[1e300]], dtype=torch.float64), None, Grid(8)), "not finite in fp32"),
        (lambda: quantize(torch.ones(2, 2), None, Grid(8), torch.ones(2, 1)), "scales are torch.bfloat16 of shape"),
        (
            lambda: quantize(torch.ones(1, 2), None, Grid(8), torch.zeros(1, 1).bfloat16()),
            "scale 0 is 0; scales are at least",
        ),
    ],
)
def test_wrong_input(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("bad", [0.0, -0.0, float("inf"), -float("inf"), float("nan"), -1e-39, 1e38])
def test_bad_scales_are_found(bad):
    scales = torch.tensor([1.0, -1.0], dtype=torch.bfloat16).repeat(3, 2)
    assert first_bad_scale(scales, INT4) is None
    scales[1, 2] = bad
    assert first_bad_scale(scales, INT4) == 6


@every_pair
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_off_its_grid_is_found(grid, dtype):
    codes, scales = quantize(weights(), None, grid)
    weight = dequantize(codes, scales, dtype)
    assert first_off_grid(weight, grid, scales) is None
    for row, column in ((3, 7), (11, 255), (0, 0)):  # the first of several last
        weight[row, column] = (weight[row, column].float() + 0.3 * scales[row, 0].float()).to(dtype)
        assert first_off_grid(weight, grid, scales) == min([(3, 7), (row, column)])
    with pytest.raises(ValueError, match=r"scales are torch\.bfloat16 of shape"):
        first_off_grid(weight, grid, scales[:1])
