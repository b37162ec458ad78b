"""Statistics of a layer's inputs that the methods share: damped X'X, and X'X of inputs with norm 1.

X are a layer's inputs over all calibration tokens; I = in_features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""Fraction of the mean of H's diagonal that is added to the diagonal (SparseGPT's)."""


@dataclass(frozen=True, slots=True)
class UnitGram:
    """A layer's damped input statistics for inputs with norm 1, computed once per layer by :func:`unit_gram`."""

    norms: Tensor
    """(I,) fp32: divisors of the inputs."""
    gram: Tensor
    """(I, I) fp32 with ones on the diagonal."""
    dead: Tensor
    """(I,) bool: inputs that were zero on every token, whose weights are pruned first."""
    alive: Tensor
    """(I,) fp32: 0 for dead inputs, else 1."""


def damped_gram(gram: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Return ``gram`` = X'X, (I, I), with ``damping`` in double precision, and the dead inputs, (I,) bool.

    Dead inputs were zero on every token. ``damping``: fraction of the mean of the others' diagonal. Raises
    FloatingPointError for a ``gram`` that is not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise FloatingPointError("inputs are not finite")
    diagonal = gram.diagonal().to(torch.float64)
    dead = diagonal == 0
    mean = 1.0
    if not bool(dead.all()):
        mean = float(diagonal[~dead].mean())
    # in double precision: damping adds small numbers to a diagonal that may span many orders of magnitude
    damped = gram.to(torch.float64, copy=True)
    damped.diagonal().add_(torch.where(dead, mean, damping * mean))
    return damped, dead


def unit_gram(gram: Tensor, damping: float = DAMPING) -> UnitGram:
    """Damp ``gram`` = X'X, (I, I), and divide the inputs by their norms. Raises FloatingPointError."""
    damped, dead = damped_gram(gram, damping)
    norms = damped.diagonal().sqrt()
    damped /= norms
    damped /= norms.unsqueeze(1)
    return UnitGram(norms.to(torch.float32), damped.to(torch.float32), dead, 1.0 - dead.to(torch.float32))


def regularised_inverse(gram: Tensor, penalty: float) -> Tensor:
    """Return (gram + penalty * identity)^-1, (I, I) fp32, of a ``gram`` with ones on its diagonal."""
    raised = gram.clone()
    raised.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(raised).L)


def least_squares(start: Tensor, keep: Tensor, pulled: Tensor, gram: Tensor, steps: int) -> Tensor:
    """Return the weights W (O, I) under a mask with W H nearest to ``pulled``: conjugate gradients, row by row.

    ``start``: (O, I) fp32, 0 where pruned. ``keep``: (O, I), 0/1. ``pulled``: (O, I). ``gram``: H, (I, I), of inputs
    with norm 1.
    """
    # Each row is a separate system, whose steps are masked, so that pruned weights stay zero.
    solution = start.clone()
    mask = keep.to(start.dtype)
    residual = (pulled - solution @ gram).mul_(mask)
    direction = residual.clone()
    size = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        moved = (direction @ gram).mul_(mask)
        step = _ratio(size, (direction * moved).sum(1, keepdim=True))
        solution.addcmul_(step, direction)
        residual.addcmul_(-step, moved)
        before = size
        size = residual.square().sum(1, keepdim=True)
        direction.mul_(_ratio(size, before)).add_(residual)
    return solution


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    # a row that is solved already has 0 / 0
    return torch.where(below > 0, above / below, 0.0)
