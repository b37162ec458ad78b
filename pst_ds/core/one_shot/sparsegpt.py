"""SparseGPT and GPTQ in one pass: kept weights compensate for pruning and for quantisation.

    SparseGPT    keep the largest W_ij^2 / [H^-1]_jj of the inputs not yet passed      arXiv 2301.00774
    GPTQ         quantise the kept weights                                             arXiv 2210.17323

Both pass the inputs from first to last and move what an input loses to the inputs after it, so that the output of the
row changes least. H = X'X, (I, I), is the Gram matrix of a layer's inputs X over all calibration tokens; O =
out_features, I = in_features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.one_shot.gram import DAMPING, damped_gram
from pst_ds.core.one_shot.scored import Compensated, joined
from pst_ds.core.one_shot.shares import ALONE, Ranks, Share, keep_in_panel
from pst_ds.core.quantization import LEAST_SCALE, SCALE_DTYPE, UNUSED_SCALE, Grid, group_scales, limited, rounded_codes
from pst_ds.core.select import MatrixKeys, prune_count, select
from pst_ds.core.units import keep_in_rows

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
    if not int(failed):  # an inverse of a failed factor would be noise
        lower, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower))
    if int(failed):
        raise FloatingPointError("the Gram matrix of the inputs is not positive definite: more damping is needed")
    return InverseFactor(lower.t().to(torch.float32).contiguous(), dead)


def sparsegpt_of_share(
    share: Share,
    factor: InverseFactor,
    ranks: Ranks = ALONE,
    *,
    columns_at_a_time: int = COLUMNS_AT_A_TIME,
    grid: Grid | None = None,
    dtype: torch.dtype = torch.float32,
) -> Compensated:
    """Prune this rank's rows, and quantise them if ``grid`` is given: SparseGPT, algorithm 1 of the paper. Collective.

    The inputs are passed from first to last. The mask of ``columns_at_a_time`` inputs is chosen at the first of them,
    by w^2 / U_jj^2 of the weights at that point; for N:M, the mask of a group of M. The weights of later inputs then
    compensate for each pruned weight. "matrix" prunes the block's share of the smallest over all rows, "row" in every
    row. The counts are exact: floor(sparsity * O * I), and floor(sparsity * I) per row. Among equal scores the lowest
    flat index is pruned first.

    With ``grid``, every kept weight is quantised when it is passed, and the error is compensated too. The scale of a
    group is searched at its first input, over the weights that are kept by the scores at that point. ``dtype``: the
    dtype that the weight will be stored in; its codes can be recovered from it.

    Raises ValueError for groups that do not divide I, and FloatingPointError, on all ranks, for a weight that is not
    finite.
    """
    share.require_finite()
    rows = [_Rows(share.weight[panel], grid, dtype) for panel in share.panels]
    _pass_all(
        rows, factor, _by_saliency(share, factor, ranks), unit=share.pattern.m, at_a_time=columns_at_a_time, grid=grid
    )
    return joined([panel.outcome for panel in rows], share)


def round_under_mask(
    share: Share,
    keep: Tensor,
    factor: InverseFactor,
    grid: Grid,
    columns_at_a_time: int = COLUMNS_AT_A_TIME,
    *,
    dtype: torch.dtype = torch.float32,
) -> Compensated:
    """Quantise the kept weights of this rank's rows under a mask as :func:`sparsegpt_of_share` does: GPTQ.

    ``keep``: (O, I), true or 1 for kept weights. Pruned weights that are not 0 are compensated for.
    """
    share.require_finite()
    rows = [_Rows(share.weight[panel], grid, dtype) for panel in share.panels]
    masks = [keep[panel].to(torch.uint8) for panel in share.panels]

    def choose(_rows: "Sequence[_Rows]", start: int, stop: int) -> list[Tensor]:
        return [mask[:, start:stop] for mask in masks]

    _pass_all(rows, factor, choose, unit=0, at_a_time=columns_at_a_time, grid=grid)
    return joined([panel.outcome for panel in rows], share)


class _Rows:
    """The rows of a panel: weights that are not passed yet are still to be corrected."""

    def __init__(self, weight: Tensor, grid: Grid | None, dtype: torch.dtype):
        self.left = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        self.keep = torch.ones(weight.shape, dtype=torch.uint8, device=weight.device)
        self.rounder: _Rounder | None = None
        if grid is not None:
            self.rounder = _Rounder(grid, self.left, dtype)

    def enter(self, first: int, mask: Tensor) -> None:
        """Search the scales of the group that starts at column ``first``, by the ``mask`` of its weights."""
        assert self.rounder is not None
        kept = self.left[:, first : first + mask.shape[1]].masked_fill(mask == 0, 0.0)
        self.rounder.enter(first, kept)

    @property
    def outcome(self) -> Compensated:
        """The pruned and quantised rows, once all inputs are passed."""
        scales = None
        if self.rounder is not None:
            scales = self.rounder.scales
        return Compensated(self.left, self.keep, scales)


Choice = Callable[[Sequence[_Rows], int, int], list[Tensor]]
"""Returns the uint8 masks (rows, stop - start) of inputs [start, stop) from the current weights."""


def _by_saliency(share: Share, factor: InverseFactor, ranks: Ranks) -> Choice:
    """Return the choice of SparseGPT: the smallest w_j^2 / U_jj^2 are pruned. The choice is collective for "matrix"."""
    sparsity = share.sparsity

    def choose(rows: Sequence[_Rows], start: int, stop: int) -> list[Tensor]:
        divisors = factor.upper.diagonal()[start:stop]
        dead = factor.dead[start:stop]
        scores = [(panel.left[:, start:stop] / divisors).square().masked_fill_(dead, 0.0) for panel in rows]
        if share.pattern.kind == "n:m":
            return [keep_in_panel(panel_scores, share) for panel_scores in scores]
        keys = [panel_scores.view(torch.int32) for panel_scores in scores]  # of numbers from 0 on: the same order
        # Differences of running counts, so that the counts of all steps add up to the exact count at the end.
        if share.pattern.kind == "row":
            count = prune_count(sparsity, stop) - prune_count(sparsity, start)
            return [keep_in_rows(panel_keys, (1, stop - start), count) for panel_keys in keys]
        num_rows = len(share.weight)  # of all ranks
        count = prune_count(sparsity, num_rows * stop) - prune_count(sparsity, num_rows * start)
        (cut,) = select([MatrixKeys(count, keys.__iter__)], ranks.sums, share.weight.device)
        return cut.keep_all(keys)

    return choose


class _Rounder:
    """Quantises the columns of a matrix; the scale of a group is searched at its first column."""

    def __init__(self, grid: Grid, left: Tensor, dtype: torch.dtype):
        outputs, inputs = left.shape
        groups = grid.num_groups(inputs)
        self._grid = grid
        self._dtype = dtype
        self.size = inputs // groups
        self.scales = torch.full((outputs, groups), UNUSED_SCALE, dtype=SCALE_DTYPE, device=left.device)
        numbers = torch.finfo(dtype)
        self._least = max(LEAST_SCALE, 2 * numbers.smallest_normal * numbers.eps)
        """Smaller scales would give steps below the resolution of the dtype."""

    def enter(self, first: int, kept: Tensor) -> None:
        """Search the scales of the group that starts at column ``first``. ``kept``: (O, size), 0 where pruned."""
        # Errors grow from column to column where H is nearly singular.
        if not bool(torch.isfinite(kept).all()):
            raise FloatingPointError("weights that make up for others are not finite")
        searched = group_scales(kept.contiguous(), self._grid, self._dtype)
        self.scales[:, first // self.size] = limited(searched, self._least, math.inf)

    def rounded(self, column: Tensor, index: int) -> Tensor:
        """Return code * scale of column ``index``, (O,)."""
        scales = self.scales[:, index // self.size].float()
        return rounded_codes(column, scales, self._grid).mul_(scales).add_(0.0)  # turns -0.0 into +0.0


def _pass_all(
    rows: Sequence[_Rows], factor: InverseFactor, choose: Choice, *, unit: int, at_a_time: int, grid: Grid | None
) -> None:
    """Pass all inputs. ``unit``: inputs whose mask must be chosen together; 0 for all that are passed in one step.

    Collective if ``choose`` is. With a ``unit``, a rank chooses for its panels one after another: only N:M has one, and
    its choice needs no other rank.
    """
    inputs = len(factor.dead)
    group = 1
    if grid is not None and grid.group:
        group = inputs // grid.num_groups(inputs)
    # A step has whole units and whole groups: weights after it are not corrected yet when one of its masks is chosen.
    whole = math.lcm(unit or 1, group)
    step = max(1, at_a_time // whole) * whole
    if grid is not None and grid.num_groups(inputs) == 1:  # a scale for each whole row
        for panel, mask in zip(rows, choose(rows, 0, inputs), strict=True):
            panel.enter(0, mask)
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        if not unit:
            for panel, mask in zip(rows, choose(rows, start, stop), strict=True):
                panel.keep[:, start:stop] = mask
        for panel in rows:
            errors = _pass_columns(panel, factor.upper, choose, unit=unit, start=start, stop=stop)
            # Later inputs are corrected once per step, by a product that replaces one update for each column.
            panel.left[:, stop:] -= errors @ factor.upper[start:stop, stop:]


def _pass_columns(rows: _Rows, upper: Tensor, choose: Choice, *, unit: int, start: int, stop: int) -> Tensor:
    """Prune and quantise columns [start, stop), and correct those after them; with a ``unit``, choose their mask.

    Returns the errors, (rows, stop - start), that correct later inputs.
    """
    left = rows.left
    keep = rows.keep
    rounder = rows.rounder
    errors = left.new_zeros(len(left), stop - start)
    chosen = start if unit else stop  # the mask is known up to this column
    for j in range(start, stop):
        if j == chosen:
            chosen = min(j + unit, stop)
            keep[:, j:chosen] = choose([rows], j, chosen)[0]
        value = left[:, j]
        if rounder is not None:
            if j % rounder.size == 0 and rounder.size < left.shape[1]:
                end = j + rounder.size
                mask = keep[:, j:end]
                if end > chosen:  # a group of several units: the mask by the weights so far, for the scale only
                    mask = choose([rows], j, end)[0]
                rows.enter(j, mask)
            value = rounder.rounded(value, j)
        value = torch.where(keep[:, j] == 0, 0.0, value)  # (rows,)
        errors[:, j - start] = (left[:, j] - value) / upper[j, j]
        left[:, j] = value
        left[:, j + 1 : stop] -= errors[:, j - start, None] * upper[j, j + 1 : stop]
    return errors
