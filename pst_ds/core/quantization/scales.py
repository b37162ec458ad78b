"""Quantisation to codes, and the search for the scale."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pst_ds.core.quantization.grid import Grid
from pst_ds.core.quantization.native import native_for, threads_for

SCALE_DTYPE = torch.bfloat16
LEAST_SCALE = torch.finfo(SCALE_DTYPE).tiny
"""The smallest scale, 2^-126. Smaller ones would be denormal, which some processors treat as 0."""
RULE_OF_SCALES = "scales are at least 2^-126, and times the largest code still finite in bf16"
UNUSED_SCALE = 1.0
"""Scale of a group without weights."""
_DIVISORS = {
    8: (124.0, 125.0, 126.0, 128.0, 130.0, 133.0, 136.0, 140.0, 145.0, 150.0),
    4: (4.0, 5.0, 5.5, 6.0, 6.5, 7.5, 8.0, 8.5, 9.0, 10.0, 11.0),
}
"""Scales that are tried: the largest magnitude of the group divided by these. Weights beyond the largest code are
clipped.
"""
_REFITS = 2
_WEIGHT_BITS = 28
"""Bits of a group's weights as integers; sums over 2^18 of them times a code stay below 2^53."""


def group_scales(grouped: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the scale of least squared error for every row of ``grouped``: (groups, weights per group) to (groups,).

    ``grouped``: finite, fp32, 0 where pruned. ``dtype``: the dtype in which a quantised weight must be finite.
    """
    magnitudes, grouped = grouped.abs().amax(1), grouped.contiguous()
    whole = whole_weights(grouped, magnitudes)
    return search_scales(magnitudes, lambda scales: group_moments(grouped, whole, scales, grid), grid, dtype)


def whole_weights(grouped: Tensor, magnitudes: Tensor) -> Tensor:
    """Return weights in units of :func:`unit_of`, rounded: (groups, n) fp32, contiguous, to (groups, n) int32.

    ``magnitudes``: (groups,) fp32, the largest of each whole group, which may include more weights.
    """
    unit, native = unit_of(magnitudes), native_for(grouped)
    if native is None:
        return (grouped.double() / unit.unsqueeze(1)).round_().int()
    (groups, size), factors = grouped.shape, 1.0 / unit
    whole = torch.empty(groups, size, dtype=torch.int32)
    native.pst_whole_weights(
        grouped.data_ptr(), groups, size, factors.data_ptr(), whole.data_ptr(), threads_for(grouped.numel())
    )
    return whole


def group_losses(grouped: Tensor, scales: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the sums of (w - code * scale)^2 and of w^2 over each row: (groups,) float64.

    ``grouped``: (groups, n) fp32, contiguous. ``scales``: (groups,) fp32.
    """
    native = native_for(grouped)
    if native is None:
        rounded = rounded_codes(grouped, scales.unsqueeze(1), grid).mul_(scales.unsqueeze(1))
        weights = grouped.double()
        return (weights - rounded).square().sum(1), weights.square().sum(1)
    (groups, size), scales = grouped.shape, scales.contiguous()
    errors, squares = torch.empty(2, groups, dtype=torch.float64)
    native.pst_grid_losses(
        grouped.data_ptr(),
        groups,
        size,
        scales.data_ptr(),
        grid.largest,
        errors.data_ptr(),
        squares.data_ptr(),
        threads_for(grouped.numel()),
    )
    return errors, squares


def group_moments(grouped: Tensor, whole: Tensor, scales: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the sums of w code and of code^2 over each row for :func:`search_scales`: (groups,) float64.

    ``grouped``: (groups, n) fp32, contiguous, 0 where pruned. ``whole``: its :func:`whole_weights`. ``scales``:
    (groups,) fp32.
    """
    native = native_for(grouped)
    if native is None:
        codes = rounded_codes(grouped, scales.unsqueeze(1), grid).double()
        return torch.linalg.vecdot(whole.double(), codes), torch.linalg.vecdot(codes, codes)
    (groups, size), scales = grouped.shape, scales.contiguous()
    by_weight, by_code = torch.empty(2, groups, dtype=torch.float64)
    native.pst_grid_moments(
        grouped.data_ptr(),
        whole.data_ptr(),
        groups,
        size,
        scales.data_ptr(),
        grid.largest,
        by_weight.data_ptr(),
        by_code.data_ptr(),
        threads_for(grouped.numel()),
    )
    return by_weight, by_code


def unit_of(magnitudes: Tensor) -> Tensor:
    """Return the unit in which :func:`search_scales` measures weights: powers of two, float64, about 2^-28 of a group's
    magnitude.

    ``magnitudes``: the largest of each group, fp32.
    """
    _, exponents = torch.frexp(magnitudes.double())
    return torch.ldexp(torch.ones_like(magnitudes, dtype=torch.float64), exponents - _WEIGHT_BITS)


def search_scales(
    magnitudes: Tensor,
    moments: Callable[[Tensor], tuple[Tensor, Tensor]],
    grid: Grid,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the bf16 scales of least squared error among those tried: (groups,).

    Tried are ``magnitude / largest code``, so the error is never above the error of plain rounding, some larger and
    smaller scales, and the least-squares scale for the codes of the best, sum(w code) / sum(code^2), twice.

    ``magnitudes``: (groups,) fp32, the largest of each group. ``moments``: function that returns, for fp32 scales
    (groups,) which are bf16 numbers, the sums of w code and of code^2 over each group in float64, (groups,) each, where
    w is a rounded weight in units of :func:`unit_of`. These are integers below 2^53, so sums over shards of a group may
    be added. ``dtype``: the dtype in which a quantised weight must be finite. A group of magnitude 0 has scale 1.
    """
    limit = largest_scale(grid, dtype)
    unit = unit_of(magnitudes)

    def rounded(scales: Tensor) -> Tensor:
        return scales.float().clamp(LEAST_SCALE, limit).to(SCALE_DTYPE).float()

    def judged(scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        by_weight, by_code = moments(scales)
        in_units = scales.double() / unit
        return scales, in_units * (in_units * by_code - 2 * by_weight), by_weight, by_code

    def better(best: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        wins = other[1] < best[1]
        return tuple(torch.where(wins, new, old) for new, old in zip(other, best, strict=True))

    best: tuple[Tensor, ...] = judged(rounded(magnitudes / grid.largest))
    for divisor in _DIVISORS[grid.bits]:
        best = better(best, judged(rounded(magnitudes / divisor)))
    for _ in range(_REFITS):
        fitted = best[2] / best[3].clamp(min=1) * unit
        best = better(best, judged(rounded(torch.where(best[3] > 0, fitted.float(), best[0]))))
    return torch.where(magnitudes > 0, best[0], UNUSED_SCALE).to(SCALE_DTYPE)


def rounded_codes(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Return the codes of fp32 weights as fp32, for fp32 scales that broadcast to them.

    Division and rounding are IEEE's, the same on every device.
    """
    return (weight / scales).round_().clamp_(-grid.largest, grid.largest)


def nearest_codes(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Return the int8 codes of ``weight`` for ``scales`` that broadcast to it: w / scale in fp32, half to even."""
    return rounded_codes(weight.float(), scales.float(), grid).to(torch.int8)


def first_bad_scale(scales: Tensor, grid: Grid) -> int | None:
    """Return the flat index of the first bf16 scale that is outside the valid range, or None.

    Scales are at least 2^-126, and their products with the largest code are finite in bf16.
    """
    good = (scales >= LEAST_SCALE) & (scales <= largest_scale(grid, SCALE_DTYPE))
    return None if bool(good.all()) else int(good.flatten().to(torch.uint8).argmin())


def require_scales(scales: Tensor, grid: Grid) -> None:
    """Raise ValueError with index and value for the first bf16 scale that :func:`first_bad_scale` finds."""
    bad = first_bad_scale(scales, grid)
    if bad is not None:
        raise ValueError(f"scale {bad} is {float(scales.flatten()[bad]):g}; {RULE_OF_SCALES}")


def largest_scale(grid: Grid, dtype: torch.dtype) -> float:
    """Return the largest bf16 number whose product with the largest code is finite in ``dtype`` and in bf16."""
    most = min(torch.finfo(dtype).max, torch.finfo(SCALE_DTYPE).max) / grid.largest
    scale = torch.tensor(most).to(SCALE_DTYPE)
    if float(scale) > most:
        scale = (scale.view(torch.int16) - 1).view(SCALE_DTYPE)
    return float(scale)
