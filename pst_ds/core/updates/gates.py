"""Learned ranks: a gate on every component of an update, W = W0 + beta U diag(g) V, and which components are kept.

Component j of a matrix is the outer product of column j of U and row j of V. Its gate is g = 2 sigmoid(a), where a is
trained per component, or shared by all components of the matrix ("layer", arXiv 2509.03057). a starts at 0, where g is
1 and the update is the same as without gates. A component that a budget drops has a = :data:`DROPPED`, whose sigmoid is
exactly 0 and has no gradient. The gate and its U and V then no longer change, and no further state needs to be saved.

Shapes, in addition to :mod:`pst_ds.core.factors`: gates G (P*r,), or (P,) for one per matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pst_ds.core.layout import WeightLayout

DROPPED = -1e4
"""Gate of a dropped component before the sigmoid: finite, and representable in every float dtype."""


def gate_values(gates: Tensor) -> Tensor:
    return 2.0 * torch.sigmoid(gates)


def is_dropped(gates: Tensor) -> Tensor:
    return gates <= DROPPED / 2


def gated_rows(V: Tensor, gates: Tensor, num_matrices: int) -> Tensor:
    """Return diag(g) V, (P*r, I), which replaces V in every formula."""
    return V * _by_row(gate_values(gates), V, num_matrices)


def gate_gradients(grad: Tensor, V: Tensor, gates: Tensor, num_matrices: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of V (P*r, I) and of the gates from ``grad`` of :func:`gated_rows`, in its dtype.

    dV = g dVg    da = sum over components of rowsum(dVg . V) g (1 - g / 2)
    """
    values = gate_values(gates.to(grad.dtype))
    by_row = torch.einsum("ri,ri->r", grad, V.to(grad.dtype)).view(num_matrices, -1)
    by_gate = by_row if gates.numel() == V.shape[0] else by_row.sum(1, keepdim=True)
    slope = values * (1.0 - values / 2.0)
    return grad * _by_row(values, V, num_matrices), by_gate.reshape(-1) * slope


def _by_row(values: Tensor, V: Tensor, num_matrices: int) -> Tensor:
    """Expand (P*r,) or (P,) to (P*r, 1)."""
    rank = V.shape[0] // num_matrices
    return values.view(num_matrices, -1).expand(num_matrices, rank).reshape(-1, 1)


def importance(U: Tensor, V: Tensor, gates: Tensor, layout: WeightLayout, magnitude_scales: Sequence[float]) -> Tensor:
    """Return how far the components of each gate move the weights, relative to these: float64, shaped as the gates.

    It is |U_j g_j V_j|_F / (sqrt(o I) mean|W0|) for a matrix of o outputs: the root mean square of what a component
    adds to a weight. A shared gate has the value of the sum of its components. A dropped gate has -1.
    """
    P, outputs = layout.num_matrices, layout.out_features // layout.num_matrices
    left = U.double().view(P, outputs, -1)
    right = gated_rows(V.double(), gates.double(), P).view(P, -1, V.shape[1])
    of_left, of_right = left.transpose(1, 2) @ left, right @ right.transpose(1, 2)  # |L R|^2 = sum of (L' L) . (R R')
    products = of_left * of_right
    squares = products.diagonal(dim1=1, dim2=2) if gates.numel() == V.shape[0] else products.sum((1, 2)).unsqueeze(1)
    scales = torch.tensor(magnitude_scales, dtype=torch.float64, device=U.device).unsqueeze(1)
    found = squares.clamp(min=0.0).sqrt() / (scales * math.sqrt(outputs * layout.in_features))
    return found.reshape(-1).masked_fill(is_dropped(gates), -1.0)


def kept_gates(importances: Sequence[Tensor], sizes: Sequence[int], budget: int) -> list[Tensor]:
    """Return which gates are kept: bool, one tensor per entry of ``importances``.

    Gates are kept in decreasing order of importance, equal ones by lowest index, until the next would exceed ``budget``
    components. ``sizes``: components per gate of each tensor. Dropped gates stay dropped.
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
