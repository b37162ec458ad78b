"""SparseGPT and GPTQ in one pass: kept weights compensate for pruning and for quantisation.

    SparseGPT    keep the largest W_ij^2 / [H^-1]_jj of the inputs not yet passed      arXiv 2301.00774
    GPTQ         quantise the kept weights                                             arXiv 2210.17323

Both pass the inputs from first to last and move what an input loses to the inputs after it, so that the output of the
row changes least. H = X'X, (I, I), is the Gram matrix of a layer's inputs X over all calibration tokens; O =
out_features, I = in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.keys import order_keys
from pst_ds.core.layout import WeightLayout
from pst_ds.core.one_shot.gram import DAMPING, damped_gram
from pst_ds.core.one_shot.scored import Compensated, keep_but
from pst_ds.core.patterns import Pattern
from pst_ds.core.quantization import LEAST_SCALE, SCALE_DTYPE, UNUSED_SCALE, Grid, group_scales, rounded_codes
from pst_ds.core.select import prune_count
from pst_ds.core.units import keep_in_rows, keep_n_of_m

COLUMNS_AT_A_TIME = 128
"""Inputs whose mask SparseGPT chooses together (the paper's)."""


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """The inverse of a layer's input statistics, computed once per layer by :func:`inverse_factor`."""

    upper: Tensor
    """Upper triangular U with U'U = (H + damping)^-1, (I, I) fp32. [U]_jj^2 is [H^-1]_jj once inputs < j are passed."""
    dead: Tensor
    """Inputs that were zero on every token, (I,) bool: their weights are pruned first."""


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> InverseFactor:
    """Return the Cholesky factor of the inverse of a damped ``gram`` = X'X, (I, I), computed in double precision.

    ``damping``: see :func:`damped_gram`. Raises FloatingPointError for a ``gram`` that is not finite or nearly
    singular.
    """
    damped, dead = damped_gram(gram, damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not int(failed):
        lower, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower))
    if int(failed):
        raise FloatingPointError("the Gram matrix of the inputs is not positive definite: more damping is needed")
    return InverseFactor(lower.t().to(torch.float32).contiguous(), dead)


def sparsegpt(
    weight: Tensor,
    factor: InverseFactor,
    pattern: Pattern,
    sparsity: float,
    columns_at_a_time: int = COLUMNS_AT_A_TIME,
    *,
    grid: Grid | None = None,
    dtype: torch.dtype = torch.float32,
) -> Compensated:
    """Prune a matrix (O, I), and quantise it if ``grid`` is given: SparseGPT, algorithm 1 of the paper.

    The inputs are passed from first to last. The mask of ``columns_at_a_time`` inputs is chosen at the first of them,
    by w^2 / U_jj^2 of the weights at that point; for N:M, the mask of a group of M. The weights of later inputs then
    compensate for each pruned weight. "matrix" prunes the block's share of the smallest over all rows, "row" in every
    row. The counts are exact: floor(sparsity * O * I), and floor(sparsity * I) per row. Among equal scores the lowest
    flat index is pruned first.

    With ``grid``, every kept weight is quantised when it is passed, and the error is compensated too. The scale of a
    group is searched at its first input, over the weights that are kept by the scores at that point. ``dtype``: the
    dtype that the weight will be stored in; its codes can be recovered from it.

    Raises ValueError for other patterns and for groups that do not divide I, and FloatingPointError for a weight that
    is not finite.
    """
    if pattern.kind not in ("matrix", "row", "n:m"):
        raise ValueError(f'SparseGPT has the patterns "matrix", "row" and N:M, not {str(pattern)!r}')
    pattern.require_fit(WeightLayout(weight.shape[0], weight.shape[1]))
    choose = _by_saliency(pattern, sparsity, factor)
    return _compensated(weight, factor, choose, pattern.m, columns_at_a_time, grid, dtype)


def round_under_mask(
    weight: Tensor,
    keep: Tensor,
    factor: InverseFactor,
    grid: Grid,
    columns_at_a_time: int = COLUMNS_AT_A_TIME,
    *,
    dtype: torch.dtype = torch.float32,
) -> Compensated:
    """Quantise the kept weights of a matrix (O, I) under a mask as :func:`sparsegpt` does with ``grid``: GPTQ.

    ``keep``: (O, I), true or 1 for kept weights. Pruned weights that are not 0 are compensated for.
    """

    def choose(_left: Tensor, start: int, stop: int) -> Tensor:
        return (keep[:, start:stop] != 0).to(torch.uint8)

    return _compensated(weight, factor, choose, 0, columns_at_a_time, grid, dtype)


Choice = Callable[[Tensor, int, int], Tensor]
"""Returns the uint8 mask (O, stop - start) of inputs [start, stop) from the current weights (O, I)."""


def _by_saliency(pattern: Pattern, sparsity: float, factor: InverseFactor) -> Choice:
    def choose(left: Tensor, start: int, stop: int) -> Tensor:
        saliency = (left[:, start:stop] / factor.upper.diagonal()[start:stop]).square()
        keys = order_keys(saliency.masked_fill_(factor.dead[start:stop], 0.0))
        if pattern.kind == "n:m":
            return keep_n_of_m(keys, (1, pattern.m), pattern.m - pattern.n)
        if pattern.kind == "row":
            return keep_in_rows(keys, (1, stop - start), prune_count(sparsity, stop) - prune_count(sparsity, start))
        so_far, before = (prune_count(sparsity, len(left) * end) for end in (stop, start))
        return keep_but(keys, so_far - before)

    return choose


class _Rounder:
    """Quantises the columns of a matrix; the scale of a group is searched at its first column."""

    def __init__(self, grid: Grid, left: Tensor, dtype: torch.dtype):
        outputs, inputs = left.shape
        groups = grid.num_groups(inputs)
        self._grid, self._dtype, self.size = grid, dtype, inputs // groups
        self.scales = torch.full((outputs, groups), UNUSED_SCALE, dtype=SCALE_DTYPE, device=left.device)
        numbers = torch.finfo(dtype)
        self._least = max(LEAST_SCALE, 2 * numbers.smallest_normal * numbers.eps)
        """Smaller scales would give steps below the resolution of the dtype."""

    def enter(self, first: int, kept: Tensor) -> None:
        """Search the scales of the group that starts at column ``first``. ``kept``: (O, size), 0 where pruned."""
        if not bool(torch.isfinite(kept).all()):
            raise FloatingPointError("weights that make up for others are not finite")
        found = group_scales(kept.contiguous(), self._grid, self._dtype)
        self.scales[:, first // self.size] = found.clamp(min=self._least)

    def rounded(self, column: Tensor, index: int) -> Tensor:
        """Return code * scale of column ``index``, (O,)."""
        scales = self.scales[:, index // self.size].float()
        return rounded_codes(column, scales, self._grid).mul_(scales).add_(0.0)


def _compensated(
    weight: Tensor,
    factor: InverseFactor,
    choose: Choice,
    unit: int,
    at_a_time: int,
    grid: Grid | None,
    dtype: torch.dtype,
) -> Compensated:
    """Pass all inputs. ``unit``: inputs whose mask must be chosen together; 0 for all that are passed in one step."""
    left = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(left).all()):
        raise FloatingPointError("weights are not finite")
    rounder = None if grid is None else _Rounder(grid, left, dtype)
    whole = math.lcm(unit or 1, rounder.size if rounder and grid and grid.group else 1)
    step = max(1, at_a_time // whole) * whole
    keep, inputs = torch.ones(weight.shape, dtype=torch.uint8, device=weight.device), weight.shape[1]
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        errors = _pass_columns(left, keep, factor.upper, choose, unit, rounder, start, stop)
        left[:, stop:] -= errors @ factor.upper[start:stop, stop:]
    return Compensated(left, keep, None if rounder is None else rounder.scales)


def _pass_columns(
    left: Tensor,
    keep: Tensor,
    upper: Tensor,
    choose: Choice,
    unit: int,
    rounder: _Rounder | None,
    start: int,
    stop: int,
) -> Tensor:
    """Choose the mask of columns [start, stop), prune and quantise them, and correct those after them.

    Writes ``keep``, and ``left`` up to ``stop``. Returns the errors, (O, stop - start), that correct later inputs.
    """
    together = unit or stop - start
    errors = left.new_zeros(len(left), stop - start)
    for j in range(start, stop):
        if (j - start) % together == 0:
            chosen = min(j + together, stop)
            keep[:, j:chosen] = choose(left, j, chosen)
        value = left[:, j]
        if rounder is not None:
            if j % rounder.size == 0:
                end = j + rounder.size
                kept = keep[:, j:end] if end <= chosen else choose(left, j, end)
                rounder.enter(j, left[:, j:end].masked_fill(kept == 0, 0.0))
            value = rounder.rounded(value, j)
        value = torch.where(keep[:, j] == 0, 0.0, value)
        errors[:, j - start] = (left[:, j] - value) / upper[j, j]
        left[:, j] = value
        left[:, j + 1 : stop] -= errors[:, j - start, None] * upper[j, j + 1 : stop]
    return errors
