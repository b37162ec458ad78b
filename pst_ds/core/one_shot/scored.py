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

from pst_ds.core.one_shot.shares import Share


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
    # A rank may have no panel: torch.cat then needs a tensor with the right width and dtype.
    no_rows = share.weight.new_empty(0, share.weight.shape[1], dtype=torch.float32)
    weights = [no_rows]
    masks = [no_rows.to(torch.uint8)]
    scales: list[Tensor] = []
    for panel in panels:
        weights.append(panel.weight)
        masks.append(panel.keep)
        if panel.scales is not None:
            scales.append(panel.scales)
    return Compensated(torch.cat(weights), torch.cat(masks), torch.cat(scales) if scales else None)


def wanda_scores(weight: Tensor, input_norms: Tensor, *, transposed: bool = False) -> Tensor:
    """Return |W_ij| ||x_j||_2: fp32 in the stored shape of ``weight``, (O, I), or (I, O) if ``transposed``.

    ``input_norms``: (I,), over all calibration tokens.
    """
    norms = input_norms.to(weight.device, torch.float32)
    if transposed:
        norms = norms.unsqueeze(1)  # (I, 1): inputs are the rows
    return weight.to(torch.float32).abs() * norms
