"""Blocks of GGUF against loops written out, and against the package gguf if it is there."""

import numpy as np
import pytest
import torch

from pst_ds.core.quantization import Grid, dequantize, quantize, round_to_grid
from pst_ds.formats.gguf_blocks import BLOCK, gguf_blocks
from tests.pairs import every_pair

GRIDS = [Grid(8, 32), Grid(4, 32)]


def weights_of_blocks(blocks, grid):
    """The weight that blocks represent, (O, I) fp32, as ggml's source describes it."""
    size = 2 + BLOCK * grid.bits // 8
    parts = blocks.unflatten(1, (-1, size))
    half = parts[..., :2].contiguous().view(torch.float16).float()
    codes = parts[..., 2:]
    if grid.bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1).to(torch.int16) - 8
    else:
        codes = codes.contiguous().view(torch.int8)
    return (codes.float() * half).flatten(1)


def weights(shape=(5, 96), size=0.1, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    return torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.6, 0.0, weight)


def by_loops(blocks, bits):
    """(scale, codes) of every block."""
    size, found = 2 + 4 * bits, []
    for row in blocks.numpy():
        for at in range(0, len(row), size):
            block = row[at : at + size].tobytes()
            scale = float(np.frombuffer(block[:2], "<f2")[0])
            held = list(block[2:])
            if bits == 8:
                codes = [code - 256 if code > 127 else code for code in held]
            else:
                codes = [byte % 16 - 8 for byte in held] + [byte // 16 - 8 for byte in held]
            found.append((scale, codes))
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_hold_the_scales_and_codes_of_the_grid(grid):
    weight = weights()
    blocks, changed = gguf_blocks(weight, None, grid)
    assert blocks.shape == (5, 3 * (2 + 4 * grid.bits))
    codes, scales = quantize(weight, None, grid)
    assert changed == 0
    expected = list(zip(scales.flatten().tolist(), codes.view(-1, 32).tolist(), strict=True))
    assert by_loops(blocks, grid.bits) == expected
    assert torch.equal(weights_of_blocks(blocks, grid), dequantize(codes, scales))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_package_gguf_reads_them(grid):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0 if grid.bits == 8 else gguf.GGMLQuantizationType.Q4_0
    weight = weights()
    blocks, _ = gguf_blocks(weight, None, grid)
    found = gguf.quants.dequantize(blocks.numpy(), kind)
    assert np.array_equal(found, round_to_grid(weight, None, grid).numpy())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pruned_weights_are_zero_and_not_looked_at(grid):
    weight = weights()
    keep = weight != 0
    odd = torch.where(keep, weight, float("nan"))
    blocks, _ = gguf_blocks(odd, keep, grid)
    assert torch.equal(blocks, gguf_blocks(weight, None, grid)[0])
    assert not weights_of_blocks(blocks, grid)[~keep].any()


@every_pair
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", [1e-7, 3e-6, 1e-3])
def test_scales_that_fp16_lacks_are_rounded_to_it_and_codes_follow(grid, size):
    weight = weights(size=size)
    blocks, changed = gguf_blocks(weight, None, grid)
    assert (changed > 0) is (size < 1e-3)
    found = weights_of_blocks(blocks, grid)
    scales = torch.tensor([scale for scale, _ in by_loops(blocks, grid.bits)]).view(5, 3, 1)
    assert (scales != 0).all()
    assert (scales > 0).all() == (grid.bits == 8)
    low, high = _ends(scales, grid)
    inside = ((low <= weight) & (weight <= high)).view(5, 96)
    room = (scales.abs() * 0.5001).expand(5, 3, 32).flatten(1)
    assert ((found - weight).abs() <= room)[inside].all()


@pytest.mark.parametrize("grid", [Grid(8), Grid(4, 64), Grid(4)], ids=str)
def test_blocks_of_a_wider_group_share_its_scale(grid):
    weight = weights((3, 128))
    blocks, _ = gguf_blocks(weight, None, grid)
    codes, scales = quantize(weight, None, grid)
    assert torch.equal(weights_of_blocks(blocks, grid), dequantize(codes, scales))
    again, _ = gguf_blocks(dequantize(codes, scales), None, grid, scales)
    assert torch.equal(again, blocks)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="GGUF has blocks of 32 inputs, which do not divide 48"):
        gguf_blocks(weights((2, 48)), None, Grid(8))


# Thousands of odd inputs

ODD = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 2.0**-126, 1e-30, 7e4, -3e38, 3.4e38]


def _odd_inputs(seed):
    """(weight, mask, grid, scales) of which most are odd somewhere."""
    rng = np.random.default_rng(seed)
    grid = Grid(int(rng.choice([4, 8])), [None, 32, 64, 128][rng.integers(4)])
    rows, columns = int(rng.integers(1, 5)), int(rng.choice([32, 64, 128, 128, 256, 48, 0]))
    weight = torch.from_numpy(rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-12, 5)).float()
    if weight.numel() and rng.random() < 0.4:
        weight.view(-1)[int(rng.integers(weight.numel()))] = ODD[rng.integers(len(ODD))]
    weight = weight.to([torch.float32, torch.bfloat16, torch.float16][rng.integers(3)])
    keep = None if rng.random() < 0.4 else torch.from_numpy(rng.random((rows, columns)) < rng.random())
    scales = None
    if rng.random() < 0.5:
        groups = max(1, columns // (grid.group or columns or 1))
        scales = torch.from_numpy(10.0 ** rng.uniform(-9, 4, (rows, groups))).to(torch.bfloat16)
        match rng.integers(8):
            case 0:
                scales.view(-1)[0] = ODD[rng.integers(len(ODD))]
            case 1:
                scales = -scales
            case 2:
                scales = scales.half()
            case 3:
                scales = scales[:, :0]
            case 4:
                scales = torch.cat([scales, scales])
    return weight, keep, grid, scales


def _ends(scales, grid):
    """The smallest and the largest weight of each block, (O, I), for scales (O, blocks, 1)."""
    ends = scales * torch.tensor([grid.least, grid.largest])
    return [end.repeat_interleave(BLOCK, 1) for end in torch.aminmax(ends, dim=2)]


@pytest.mark.few(1)
@pytest.mark.parametrize("first", range(0, 3000, 300))
def test_odd_weights_and_scales_are_refused_or_blocks_that_are_near(first):
    written = 0
    for seed in range(first, first + 300):
        weight, keep, grid, scales = _odd_inputs(seed)
        try:
            blocks, changed = gguf_blocks(weight, keep, grid, scales)
        except ValueError:
            continue
        written += 1
        found = weights_of_blocks(blocks, grid)
        kept = weight.float() if keep is None else torch.where(keep, weight.float(), 0.0)
        assert bool(torch.isfinite(found).all()), seed
        assert not found[kept == 0].any(), seed
        assert 0 <= changed <= weight.numel() // 32, seed
        halves = torch.tensor([scale for scale, _ in by_loops(blocks, grid.bits)]).view(len(weight), -1, 1)
        assert bool((halves != 0).all()), seed
        near = (found - kept.clamp(*_ends(halves, grid))).abs()
        steps = halves.abs().expand(-1, -1, 32).flatten(1) * 0.5001
        assert bool((near <= steps * (1 + 2**-8)).all()), seed
    assert 100 < written < 280
