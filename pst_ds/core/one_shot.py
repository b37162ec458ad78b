"""Masks made once, from a weight and the inputs of its layer: magnitude, Wanda and SparseGPT, each formula once.

    magnitude    keep the largest |W_ij|
    Wanda        keep the largest |W_ij| ||x_j||_2               Sun et al., 2023, arXiv 2306.11695
    SparseGPT    keep the largest W_ij^2 / [H^-1]_jj of the inputs not yet passed, and let the kept weights of those
                 make up for the pruned ones                       Frantar and Alistarh, 2023, arXiv 2301.00774

x_j are the values of input j over all calibration tokens, and H = X'X, (I, I), is their Gram matrix. O = out_features,
I = in_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.keys import HIGHEST_FINITE, LOWEST_FINITE, order_keys
from pst_ds.core.layout import Rect, WeightLayout
from pst_ds.core.patterns import Pattern
from pst_ds.core.select import MatrixKeys, prune_count, select
from pst_ds.core.units import block_keys, expand_units, keep_in_rows, keep_n_of_m

DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it (the paper's)."""
COLUMNS_AT_A_TIME = 128
"""Inputs whose mask SparseGPT chooses together (the paper's)."""


def wanda_scores(weight: Tensor, input_norms: Tensor, *, transposed: bool = False) -> Tensor:
    """|W_ij| ||x_j||_2: fp32 in the stored shape of ``weight``, (O, I), or (I, O) when ``transposed``.

    ``input_norms``: (I,), over all calibration tokens.
    """
    norms = input_norms.to(weight.device, torch.float32)
    return weight.to(torch.float32).abs() * (norms.unsqueeze(1) if transposed else norms)


def keep_by_score(scores: Tensor, layout: WeightLayout, pattern: Pattern, sparsity: float) -> Tensor:
    """uint8 mask, 0/1, in the stored shape of ``layout``: each of its matrices loses its smallest scores.

    ``scores``: fp32. The counts are those of training: floor(sparsity * O * I) of a matrix, floor(sparsity * I) of
    every row, M - N of every group whatever ``sparsity``, floor(sparsity * blocks); of equals the lowest flat index
    goes first. Raises ValueError for units that do not tile the matrices and for the pattern "global", and
    FloatingPointError for scores that are not finite.
    """
    if pattern.kind == "global":
        raise ValueError('pattern "global" ranks the weights of all layers together; choose "matrix" or "row"')
    pattern.require_fit(layout)
    keys, keep = order_keys(scores), torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    if bool(((keys < LOWEST_FINITE) | (keys > HIGHEST_FINITE)).any()):
        raise FloatingPointError("scores are not finite")
    for matrix in layout.matrices():
        at = slice(matrix.rect.r0, matrix.rect.r1), slice(matrix.rect.c0, matrix.rect.c1)
        keep[at] = _keep_in_matrix(keys[at].contiguous(), layout, pattern, sparsity)
    return keep


def _keep_in_matrix(keys: Tensor, layout: WeightLayout, pattern: Pattern, sparsity: float) -> Tensor:
    """The mask of one matrix, of the shape of its ``keys``."""
    unit = pattern.unit(layout)
    if pattern.kind == "row":
        return keep_in_rows(keys, unit, prune_count(sparsity, layout.in_features))
    if pattern.kind == "n:m":
        return keep_n_of_m(keys, unit, pattern.m - pattern.n)
    if pattern.kind == "matrix":
        return _keep_but(keys, prune_count(sparsity, keys.numel()))
    of_blocks = block_keys(keys, unit)
    kept = _keep_but(of_blocks, prune_count(sparsity, of_blocks.numel()))
    return expand_units(kept, Rect(0, keys.shape[0], 0, keys.shape[1]), unit)


def _keep_but(keys: Tensor, count: int) -> Tensor:
    """uint8 mask of the shape of ``keys`` without the ``count`` smallest."""
    (cut,) = select([MatrixKeys(count, lambda: iter((keys,)))], device=keys.device)
    return cut.keep(keys)[0].to(torch.uint8)


@dataclass(frozen=True, slots=True)
class InverseFactor:
    """SparseGPT's inverse of a layer's input statistics; :func:`inverse_factor` makes it once for all its matrices."""

    upper: Tensor
    """Upper triangular U with U'U = (H + damping)^-1, (I, I) fp32: the square of [U]_jj is [H^-1]_jj once the inputs
    before j are gone, and the rest of row j says how the inputs after j make up for it."""
    dead: Tensor
    """Inputs that were zero on every token, (I,) bool: their weights are pruned first."""


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> InverseFactor:
    """The Cholesky factor of the inverse of a damped ``gram`` = X'X, (I, I); computed in double precision.

    ``damping`` is a share of the mean of the diagonal over inputs that are not dead. Raises FloatingPointError for a
    ``gram`` that is not finite, or so near to singular that more damping is needed.
    """
    if not bool(torch.isfinite(gram).all()):
        raise FloatingPointError("inputs are not finite")
    diagonal = gram.diagonal().to(torch.float64)
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not bool(dead.all()) else 1.0
    damped = gram.to(torch.float64, copy=True)
    damped.diagonal().add_(torch.where(dead, mean, damping * mean))
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
) -> tuple[Tensor, Tensor]:
    """(pruned weight, fp32; mask, uint8 0/1) of one matrix (O, I): SparseGPT, algorithm 1 of the paper.

    The inputs are passed from first to last. The mask of ``columns_at_a_time`` of them is chosen when the first is
    reached, by w^2 / U_jj^2 of the weights as they are by then; of N:M that of a group of M. What pruning a weight
    takes from the output of its row is then given back, as far as it can be, by the weights of the inputs after it.
    "matrix" takes each block's share of the smallest over all rows, "row" in every row; the counts are exact:
    floor(sparsity * O * I), and floor(sparsity * I) of every row. Of equals the lowest flat index goes first.
    Raises ValueError for other patterns and for groups that do not divide I, and FloatingPointError for a weight that
    is not finite.
    """
    if pattern.kind not in ("matrix", "row", "n:m"):
        raise ValueError(f'SparseGPT has the patterns "matrix", "row" and N:M, not {str(pattern)!r}')
    outputs, inputs = weight.shape
    pattern.require_fit(WeightLayout(outputs, inputs))
    step = max(1, columns_at_a_time // pattern.m) * pattern.m if pattern.kind == "n:m" else columns_at_a_time
    left = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(left).all()):
        raise FloatingPointError("weights are not finite")
    keep = torch.ones(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, inputs, step):
        stop = min(start + step, inputs)
        errors = _prune_columns(left, keep, factor, _Columns(start, stop, pattern, sparsity))
        left[:, stop:] -= errors @ factor.upper[start:stop, stop:]
    return left.masked_fill_(keep == 0, 0.0), keep


@dataclass(frozen=True, slots=True)
class _Columns:
    start: int
    stop: int
    pattern: Pattern
    sparsity: float

    def mask(self, left: Tensor, factor: InverseFactor, start: int, stop: int) -> Tensor:
        """uint8 mask (O, stop - start) of some of these inputs."""
        saliency = (left[:, start:stop] / factor.upper.diagonal()[start:stop]).square()
        keys = order_keys(saliency.masked_fill_(factor.dead[start:stop], 0.0))
        outputs, unit = len(left), (1, stop - start)
        if self.pattern.kind == "n:m":
            return keep_n_of_m(keys, (1, self.pattern.m), self.pattern.m - self.pattern.n)
        if self.pattern.kind == "row":
            return keep_in_rows(keys, unit, prune_count(self.sparsity, stop) - prune_count(self.sparsity, start))
        so_far, before = (prune_count(self.sparsity, outputs * end) for end in (stop, start))
        return _keep_but(keys, so_far - before)


def _prune_columns(left: Tensor, keep: Tensor, factor: InverseFactor, columns: _Columns) -> Tensor:
    """Choose the mask of ``columns``, prune them one by one, and correct those among them that come later.

    Writes ``keep`` and ``left``; returns the errors, (O, number of columns), by which the inputs after them are to be
    corrected.
    """
    start, stop, upper = columns.start, columns.stop, factor.upper
    together = columns.pattern.m if columns.pattern.kind == "n:m" else stop - start
    errors = left.new_zeros(len(left), stop - start)
    for j in range(start, stop):
        if (j - start) % together == 0:
            keep[:, j : j + together] = columns.mask(left, factor, j, min(j + together, stop))
        errors[:, j - start] = torch.where(keep[:, j] == 0, left[:, j] / upper[j, j], 0.0)
        left[:, j + 1 : stop] -= errors[:, j - start, None] * upper[j, j + 1 : stop]
    return errors


def output_error(change: Tensor, gram: Tensor) -> float:
    """||X D'||^2, the squared change of a layer's outputs over all calibration tokens for a ``change`` D of W, (O, I).

    ``gram``: X'X, (I, I). Computed in double precision.
    """
    change = change.to(torch.float64)
    return float(((change @ gram.to(torch.float64)) * change).sum())
