"""Low-rank products next to a layer's own: y = layer(x) + beta (x V') U', and their gradients.

The update of one user, and that of a pruned layer with the update form "beside", which the mask does not cut.

Names: N tokens, O outputs, I inputs, r the rank, P fused matrices. U is (O, r); V is (P*r, I), r rows for each matrix.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from pst_ds.core.layout import WeightLayout


def beside(x: Tensor, left: Tensor, right: Tensor, beta: float) -> Tensor:
    """Return beta (x V') U' of one matrix, (..., O), for x (..., I), U ``left`` (O, r) and V ``right`` (r, I)."""
    return beta * linear(linear(x, right), left)


def add_beside_(y: Tensor, x: Tensor, left: Tensor, right: Tensor, layout: WeightLayout, beta: float) -> None:
    """Add beta (x V') U' of a layer to ``y`` (N, O) in place, for ``x`` (N, I)."""
    for outputs, terms in _of_matrices(layout, left.shape[1]):
        inner = linear(x, right[terms])  # (N, r)
        y[:, outputs].addmm_(inner, left[outputs].t(), alpha=beta)


def beside_gradients(
    x: Tensor,
    grad_y: Tensor,
    left: Tensor,
    right: Tensor,
    layout: WeightLayout,
    beta: float,
    *,
    grad_x: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return dU = beta grad_y' (x V') and dV = beta (grad_y U)' x, in fp32 (fp64 for fp64), for all tokens.

    Args:
        x, grad_y: (N, I) and (N, O).
        grad_x: dX of the layer's own product, (N, I), to which beta (grad_y U) V is added in place.
    """
    high = torch.promote_types(x.dtype, torch.float32)
    grad_left = torch.empty_like(left, dtype=high)
    grad_right = torch.empty_like(right, dtype=high)
    for outputs, terms in _of_matrices(layout, left.shape[1]):
        grad = grad_y[:, outputs]
        inner = linear(x, right[terms])
        grad_inner = grad @ left[outputs]  # (N, r)
        grad_left[outputs] = (grad.t() @ inner).to(high) * beta
        grad_right[terms] = (grad_inner.t() @ x).to(high) * beta
        if grad_x is not None:
            grad_x.add_(grad_inner @ right[terms], alpha=beta)
    return grad_left, grad_right


def _of_matrices(layout: WeightLayout, rank: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of U and the rows of V of each fused matrix."""
    for matrix in layout.matrices():
        yield matrix.outputs, slice(matrix.index * rank, (matrix.index + 1) * rank)
