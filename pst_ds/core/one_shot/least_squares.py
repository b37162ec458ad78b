"""The best weights under a mask, by conjugate gradients."""

from __future__ import annotations

import torch
from torch import Tensor

GRADIENT_STEPS = 15


def least_squares(start: Tensor, keep: Tensor, pulled: Tensor, gram: Tensor, steps: int = GRADIENT_STEPS) -> Tensor:
    """Return the weights W (O, I) under a mask with W H nearest to ``pulled``: conjugate gradients, row by row.

    ``start``: (O, I) fp32, 0 where pruned. ``keep``: (O, I), 0/1. ``pulled``: (O, I). ``gram``: H, (I, I), of inputs
    with norm 1. Pruned weights stay 0.
    """
    found, mask = start.clone(), keep.to(start.dtype)
    residual = (pulled - found @ gram) * mask
    direction, size = residual.clone(), residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        moved = (direction @ gram) * mask
        step = _ratio(size, (direction * moved).sum(1, keepdim=True))
        found += step * direction
        residual -= step * moved
        size, before = residual.square().sum(1, keepdim=True), size
        direction = residual + _ratio(size, before) * direction
    return found


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, and 0 where the denominator is 0."""
    return torch.where(below > 0, above / below, 0.0)
