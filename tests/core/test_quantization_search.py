"""Native quantisation, above all the search for scales, against torch: bit-identical for any finite weights."""

import pytest
import torch

from pst_ds.core import quantization
from pst_ds.core.quantization import Grid, group_scales, quantize

GRIDS = [Grid(bits, group) for bits in (8, 4) for group in (None, 32, 64, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

pytestmark = pytest.mark.skipif(quantization.library() is None, reason="no compiler")


def in_torch(grouped: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "native_for", lambda *_: None)
        return group_scales(grouped, grid, dtype)


def require_same(grouped: torch.Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> None:
    scales = group_scales(grouped, grid, dtype)
    expected = in_torch(grouped, grid, dtype)
    assert torch.equal(scales.view(torch.int16), expected.view(torch.int16))


def random_groups(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


@each_grid
@each_dtype
def test_groups_of_all_magnitudes(grid, dtype):
    """From denormal weights to the largest, next to each other, so that vectors have groups of both kinds."""
    count = 277 * 2
    grouped = random_groups(count, 64) * 0.25
    exponents = torch.arange(-149, 128).repeat(2)[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    grouped = torch.ldexp(grouped.double(), exponents.unsqueeze(1)).float()
    require_same(torch.nan_to_num(grouped), grid, dtype)


@each_grid
@pytest.mark.parametrize("size", [1, 2, 3, 31, 32, 33, 128, 1023, 1025, 2050, 4096])
@pytest.mark.parametrize("count", [1, 16, 19])
def test_sizes(grid, size, count):
    require_same(random_groups(count, size) * 0.02, grid)


@each_grid
@each_dtype
def test_sparse_constant_and_empty_groups(grid, dtype):
    grouped = random_groups(200, 64, 3) * 0.02
    kept = torch.rand(grouped.shape, generator=torch.Generator().manual_seed(4))
    grouped = torch.where(kept < torch.linspace(0, 1, 200).unsqueeze(1), grouped, 0.0)
    grouped[17] = 0.0
    grouped[18] = -0.0
    grouped[40] = 0.75
    grouped[41] = -0.3
    grouped[42, ::2], grouped[42, 1::2] = 0.3, -0.3
    grouped[43] = torch.finfo(torch.float32).max
    grouped[44] = torch.finfo(torch.float32).smallest_normal / 2**23
    grouped[45] = -torch.finfo(torch.float32).max
    grouped[46, 0] = 1e30  # an outlier: all other codes are 0
    require_same(grouped, grid, dtype)
    require_same(torch.zeros(40, 64), grid, dtype)


@each_grid
def test_weights_halfway_between_two_codes(grid):
    """Weights halfway between two codes, of which the even one is right, and the next fp32 numbers on both sides."""
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(-2 * grid.largest, 2 * grid.largest + 1, (3000, 64), generator=generator)
    scales = (torch.rand(3000, 1, generator=generator) + 0.5).bfloat16().float()
    ties = codes * 0.5 * scales
    ties[:, 0] = grid.largest * scales.squeeze(1)  # the first scale that is tried is then this one
    require_same(ties, grid)
    require_same(torch.nextafter(ties, torch.full_like(ties, torch.inf)), grid)
    require_same(torch.nextafter(ties, torch.zeros_like(ties)), grid)
    require_same((ties * 0.01).bfloat16().float(), grid)


@each_grid
@pytest.mark.parametrize("threads", [1, 3])
def test_many_weights_on_threads(grid, threads, monkeypatch):
    monkeypatch.setattr(quantization, "threads_for", lambda _: threads)
    require_same(random_groups(1000, grid.group or 700, 6).bfloat16().float() * 0.01, grid)


def test_all_weights_of_a_large_group_are_of_the_largest_magnitude():
    """The largest sums, which must not exceed their integers."""
    for grid in (Grid(8), Grid(4)):
        grouped = torch.full((16, 1 << 14), 1.0 - 2.0**-24)
        grouped[1::2] *= -1
        require_same(grouped, grid)


@each_grid
@each_dtype
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_codes_of_a_matrix(grid, dtype, transposed, masked):
    weight = (random_groups(128, 256, 7) * 0.02).to(dtype)
    keep = None
    if masked:
        keep = random_groups(128, 256, 8) > 0.3
        weight = weight.masked_fill(~keep, torch.nan)  # pruned weights may be anything
    if transposed:
        weight, keep = weight.t(), keep if keep is None else keep.t()
    codes, scales = quantize(weight, keep, grid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "native_for", lambda *_: None)
        expected = quantize(weight, keep, grid)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])
