"""Quantise whole matrices and back, a band of rows at a time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.quantization.grid import Grid
from pst_ds.core.quantization.scales import (
    SCALE_DTYPE,
    UNUSED_SCALE,
    group_scales,
    nearest_codes,
    require_scales,
)

_AT_A_TIME = {"cpu": 1 << 17}
"""Weights quantised in one step by device type; on a CPU the intermediate results then stay in the cache."""
_AT_A_TIME_ELSEWHERE = 1 << 24


def quantize(weight: Tensor, keep: Tensor | None, grid: Grid, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a matrix: (codes (O, I) int8, scales (O, groups) bf16), on the device of ``weight``.

    ``weight``: (O, I) of any float dtype. ``keep``: (O, I) bool, true for kept weights; None keeps all. Pruned weights
    have code 0 and do not affect the scale. ``scales``: use these (O, groups) bf16 scales instead of searching. Raises
    ValueError if groups do not divide the inputs, and for kept weights that are not finite.
    """
    rows, columns = weight.shape
    groups = grid.num_groups(columns)
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    found = torch.full((rows, groups), UNUSED_SCALE, dtype=SCALE_DTYPE, device=weight.device)
    if scales is not None:
        found.copy_(_checked(scales, (rows, groups), grid))
    step = _rows_at_a_time(columns, weight.device)
    for first in range(0, rows if columns else 0, step):
        band = slice(first, min(first + step, rows))
        part = weight[band].detach().float()
        if keep is not None:
            part = torch.where(keep[band], part, 0.0)
        grouped = part.reshape(-1, columns // groups)
        if not bool(torch.isfinite(grouped).all()):
            raise ValueError(f"a weight of rows {band.start} to {band.stop - 1} is not finite in fp32")
        if scales is None:
            found[band] = group_scales(grouped, grid, weight.dtype).view(-1, groups)
        codes[band] = nearest_codes(grouped, found[band].reshape(-1, 1), grid).view(-1, columns)
    return codes, found


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return code * scale, (O, I): exact in fp32 and float64, rounded once to a narrower ``dtype``; +0.0 for code 0.

    ``codes``: (O, I) int8. ``scales``: (O, groups) bf16; the number of groups divides I.
    """
    rows, columns = codes.shape
    dense = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    step = _rows_at_a_time(columns, codes.device)
    for first in range(0, rows if columns else 0, step):
        band = slice(first, first + step)
        grouped = codes[band].float().unflatten(1, (scales.shape[1], -1)) * scales[band].float().unsqueeze(2)
        dense[band] = grouped.flatten(1)
    return dense


def round_to_grid(weight: Tensor, keep: Tensor | None, grid: Grid, scales: Tensor | None = None) -> Tensor:
    """Return the weight as a program with codes and scales computes it: :func:`quantize`, then :func:`dequantize`."""
    return dequantize(*quantize(weight, keep, grid, scales), weight.dtype)


def first_off_grid(weight: Tensor, grid: Grid, scales: Tensor) -> tuple[int, int] | None:
    """Return (row, column) of the first weight that is not bit-identical to a code * scale in its dtype, or None.

    ``weight``: (O, I), finite. ``scales``: (O, groups) bf16. Raises ValueError as :func:`quantize` does.
    """
    codes, _ = quantize(weight, None, grid, scales)
    differs = (dequantize(codes, scales, weight.dtype) != weight).flatten()
    at = int(differs.to(torch.uint8).argmax()) if bool(differs.any()) else None
    return None if at is None else divmod(at, weight.shape[1])


def squared_norms(weight: Tensor, keep: Tensor, codes: Tensor, scales: Tensor) -> tuple[float, float]:
    """Return the squared norms of the quantisation error and of the kept weights of a matrix on the CPU, in float64.

    ``weight``: (O, I) of any float dtype. ``keep``: (O, I) bool, true for kept weights. ``codes`` and ``scales``: from
    :func:`quantize`. numpy adds on one thread, so the sums do not depend on the number of threads.
    """
    changed, norm = 0.0, 0.0
    step = _rows_at_a_time(weight.shape[1], weight.device)
    for first in range(0, len(weight), step):
        band = slice(first, first + step)
        kept = torch.where(keep[band], weight[band].detach().double(), 0.0)
        changed += float(np.square((kept - dequantize(codes[band], scales[band], torch.float64)).numpy()).sum())
        norm += float(np.square(kept.numpy()).sum())
    return changed, norm


def _rows_at_a_time(columns: int, device: torch.device) -> int:
    return max(1, _AT_A_TIME.get(device.type, _AT_A_TIME_ELSEWHERE) // max(1, columns))


def _checked(scales: Tensor, shape: tuple[int, int], grid: Grid) -> Tensor:
    if scales.dtype != SCALE_DTYPE or tuple(scales.shape) != shape:
        raise ValueError(
            f"scales are {SCALE_DTYPE} of shape {shape}, got {scales.dtype} of shape {tuple(scales.shape)}"
        )
    require_scales(scales, grid)
    return scales
