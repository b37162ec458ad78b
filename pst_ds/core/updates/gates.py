"""Learned ranks: a gate on every component of an update, W = W0 + beta U diag(g) V, and which components are kept.

Component j of a matrix is the outer product of column j of its U and row j of its V. Its gate is g = 2 sigmoid(a), with
a trained number of its own, or one that all components of the matrix share ("layer", arXiv 2509.03057). a starts at 0,
where g is 1 and the update is as without gates. A component that a budget drops has a = :data:`DROPPED`, whose sigmoid
is exactly 0 and has no gradient: then neither it nor its U and V change any more, and nothing else needs to be saved.

Shapes, with those of :mod:`pst_ds.core.factors`: gates G (P*r,), or (P,) for one a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pst_ds.core.layout import WeightLayout

DROPPED = -1e4
"""Of a dropped component's gate, before the sigmoid: finite, representable in every float dtype."""


def gate_values(gates: Tensor) -> Tensor:
    """Return g of each gate, in [0, 2)."""
    return 2.0 * torch.sigmoid(gates)


def is_dropped(gates: Tensor) -> Tensor:
    """Return which gates are shut for good, bool."""
    return gates <= DROPPED / 2


def gated_rows(V: Tensor, gates: Tensor, num_matrices: int) -> Tensor:
    """Return diag(g) V, (P*r, I): what stands in place of V in every formula."""
    return V * _by_row(gate_values(gates), V, num_matrices)


def gate_gradients(grad: Tensor, V: Tensor, gates: Tensor, num_matrices: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of V (P*r, I) and of the gates for ``grad``, that of :func:`gated_rows`; in its dtype.

    dV = g dVg    da = sum over components of rowsum(dVg . V) g (1 - g / 2)
    """
    values = gate_values(gates.to(grad.dtype))
    by_row = torch.einsum("ri,ri->r", grad, V.to(grad.dtype)).view(num_matrices, -1)
    by_gate = by_row if gates.numel() == V.shape[0] else by_row.sum(1, keepdim=True)
    slope = values * (1.0 - values / 2.0)
    return grad * _by_row(values, V, num_matrices), by_gate.reshape(-1) * slope


def _by_row(values: Tensor, V: Tensor, num_matrices: int) -> Tensor:
    """(P*r,) or (P,) to (P*r, 1)."""
    rank = V.shape[0] // num_matrices
    return values.view(num_matrices, -1).expand(num_matrices, rank).reshape(-1, 1)


def importance(U: Tensor, V: Tensor, gates: Tensor, layout: WeightLayout, weight_scales: Sequence[float]) -> Tensor:
    """Return how far the components of each gate move the weights, relative to these: float64, in the gates' shape.

    It is |U_j g_j V_j|_F / (sqrt(o I) mean|W0|) of a matrix of o outputs, the root mean square of what a component adds
    to a weight. Of a gate that several share, it is that of their sum. -1 where the gate is shut.
    """
    P, outputs = layout.num_matrices, layout.out_features // layout.num_matrices
    left = U.double().view(P, outputs, -1)
    right = gated_rows(V.double(), gates.double(), P).view(P, -1, V.shape[1])
    of_left, of_right = left.transpose(1, 2) @ left, right @ right.transpose(1, 2)  # |L R|^2 = sum of (L' L) . (R R')
    products = of_left * of_right
    squares = products.diagonal(dim1=1, dim2=2) if gates.numel() == V.shape[0] else products.sum((1, 2)).unsqueeze(1)
    scales = torch.tensor(weight_scales, dtype=torch.float64, device=U.device).unsqueeze(1)
    found = squares.clamp(min=0.0).sqrt() / (scales * math.sqrt(outputs * layout.in_features))
    return found.reshape(-1).masked_fill(is_dropped(gates), -1.0)


def kept_gates(importances: Sequence[Tensor], sizes: Sequence[int], budget: int) -> list[Tensor]:
    """Return which gates stay open: bool, one tensor for each of ``importances``.

    The most important come first, among equals those of the lowest index; gates are taken in this order until the next
    would exceed ``budget`` components. ``sizes``: components behind each gate of a tensor. A shut gate is never taken.
    """
    flat = torch.cat(list(importances))
    order = flat.argsort(descending=True, stable=True)
    pairs = zip(importances, sizes, strict=True)
    costs = torch.cat([torch.full_like(one, size, dtype=torch.int64) for one, size in pairs])
    taken = (costs[order].cumsum(0) <= budget) & (flat[order] >= 0.0)
    kept = torch.empty_like(taken).scatter_(0, order, taken)
    return list(kept.split([one.numel() for one in importances]))


def rank_budget(components: int, dropped_share: float) -> int:
    """Return how many of ``components`` are kept: floor((1 - dropped_share) components)."""
    return math.floor((1.0 - dropped_share) * components + 1e-9)
