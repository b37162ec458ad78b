"""One-shot masks from a score per weight, computed from the weight and the inputs of its layer.

    magnitude    keep the largest |W_ij|
    Wanda        keep the largest |W_ij| ||x_j||_2               Sun et al., 2023, arXiv 2306.11695

x_j are the values of input j over all calibration tokens. O = out_features, I = in_features.
:mod:`pst_ds.core.one_shot.sparsegpt` also changes the kept weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.keys import HIGHEST_FINITE, LOWEST_FINITE, order_keys
from pst_ds.core.layout import Rect, WeightLayout
from pst_ds.core.one_shot.shares import Share
from pst_ds.core.patterns import Pattern
from pst_ds.core.select import MatrixKeys, prune_count, select
from pst_ds.core.units import block_keys, expand_units, keep_in_rows, keep_n_of_m


@dataclass(frozen=True, slots=True)
class Compensated:
    """A pruned or quantised matrix, or both."""

    weight: Tensor
    """(O, I) fp32: +0.0 where pruned; code * scale if quantised."""
    keep: Tensor
    """(O, I) uint8, 0/1."""
    scales: Tensor | None = None
    """(O, groups) bf16, if quantised."""


def joined(panels: Sequence[Compensated], share: Share) -> Compensated:
    """Join the panels of this rank's ``share``; without any, return no rows."""
    none = share.weight.new_empty(0, share.weight.shape[1], dtype=torch.float32)
    scales = [panel.scales for panel in panels if panel.scales is not None]
    return Compensated(
        torch.cat([none, *(panel.weight for panel in panels)]),
        torch.cat([none.to(torch.uint8), *(panel.keep for panel in panels)]),
        torch.cat(scales) if scales else None,
    )


def wanda_scores(weight: Tensor, input_norms: Tensor, *, transposed: bool = False) -> Tensor:
    """Return |W_ij| ||x_j||_2: fp32 in the stored shape of ``weight``, (O, I), or (I, O) if ``transposed``.

    ``input_norms``: (I,), over all calibration tokens.
    """
    norms = input_norms.to(weight.device, torch.float32)
    return weight.to(torch.float32).abs() * (norms.unsqueeze(1) if transposed else norms)


def keep_by_score(scores: Tensor, layout: WeightLayout, pattern: Pattern, sparsity: float) -> Tensor:
    """Return the uint8 mask, 0/1, in the stored shape of ``layout``: each of its matrices loses its smallest scores.

    ``scores``: fp32. The counts are the same as in training: floor(sparsity * O * I) per matrix, floor(sparsity * I)
    per row, M - N per group regardless of ``sparsity``, floor(sparsity * blocks). Among equal scores the lowest flat
    index is pruned first. Raises ValueError for units that do not tile the matrices and for the patterns "stack" and
    "global", and FloatingPointError for scores that are not finite.
    """
    if pattern.pools_matrices:
        raise ValueError(
            f'pattern "{pattern}" ranks the weights of several matrices together; choose "matrix" or "row"'
        )
    pattern.require_fit(layout)
    keys, keep = order_keys(scores), torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    if bool(((keys < LOWEST_FINITE) | (keys > HIGHEST_FINITE)).any()):
        raise FloatingPointError("scores are not finite")
    for matrix in layout.matrices():
        at = matrix.rect.slices
        keep[at] = _keep_in_matrix(keys[at].contiguous(), layout, pattern, sparsity)
    return keep


def _keep_in_matrix(keys: Tensor, layout: WeightLayout, pattern: Pattern, sparsity: float) -> Tensor:
    unit = pattern.unit(layout)
    if pattern.kind == "row":
        return keep_in_rows(keys, unit, prune_count(sparsity, layout.in_features))
    if pattern.kind == "n:m":
        return keep_n_of_m(keys, unit, pattern.m - pattern.n)
    if pattern.kind == "matrix":
        return keep_but(keys, prune_count(sparsity, keys.numel()))
    of_blocks = block_keys(keys, unit)
    kept = keep_but(of_blocks, prune_count(sparsity, of_blocks.numel()))
    return expand_units(kept, Rect(0, keys.shape[0], 0, keys.shape[1]), unit)


def keep_but(keys: Tensor, count: int) -> Tensor:
    """Return the uint8 mask without the ``count`` smallest ``keys``, in their shape."""
    (cut,) = select([MatrixKeys(count, lambda: iter((keys,)))], device=keys.device)
    return cut.keep(keys)[0].to(torch.uint8)
