"""Products with all experts of a stack at once, without waiting for the device: torch's grouped products of bf16.

Grouped products read the ends of the experts' rows on the device. In the backward pass G = dL/d(M . W) of the whole
stack is one grouped product, and becomes M . W in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pst_ds.core.experts.routing import Routing
from pst_ds.core.factors import Factors, tile_factors
from pst_ds.core.kernels.triton.merge import MaskBits, Matrices, gradients_into
from pst_ds.core.layout import WeightLayout
from pst_ds.core.masked_linear import Gradients, LayerState, factors_with_ones, finish_factors
from pst_ds.core.tiles import DEFAULT_TILE_BYTES

MOST_MERGED_BYTES = 4 << 30
"""Largest stack that is merged at once. Experts of larger ones are multiplied one after another."""
_MULTIPLE = 8
"""Rows of a grouped product are aligned to 16 bytes."""


def serves(x: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Return whether :func:`product` multiplies ``x`` (n, inputs) with a stack of matrices of ``shape``."""
    return len(x) > 0 and x.dtype == dtype and _multiplies(x.device.type, dtype, shape)


def merges(layout: WeightLayout, dtype: torch.dtype, device_type: str) -> bool:
    """Return whether a stack is merged as a whole for one :func:`product`, instead of expert by expert."""
    is_small = layout.numel * dtype.itemsize <= MOST_MERGED_BYTES
    return is_small and _multiplies(device_type, dtype, layout.expert.shape)


def _multiplies(device_type: str, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    return device_type != "cpu" and dtype == torch.bfloat16 and all(size % _MULTIPLE == 0 for size in shape)


def experts_at_once(layout: WeightLayout, itemsize: int, tile_bytes: int) -> int:
    """Return how many experts' dS and dW the backward pass holds, for a budget of ``tile_bytes`` (0 is the default)."""
    budget = tile_bytes or DEFAULT_TILE_BYTES["cuda"]
    return min(layout.num_experts, max(1, budget // (2 * itemsize * layout.expert.numel)))


def product(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    """Return (n, I) @ (E, I, O), the products of rows with their experts, or (O, n) @ (n, I), of the experts' parts.

    The latter is (E, O, I), and not defined for experts without rows (github.com/pytorch/pytorch/issues/172439).
    """
    public = getattr(torch.nn.functional, "grouped_mm", None)  # since torch 2.10
    return (public or torch._grouped_mm)(left, right, offs=routing.ends)


def backward(
    rows: Tensor, grad_y: Tensor, state: LayerState, routing: Routing, mask: MaskBits, *, need_x: bool, tile_bytes: int
) -> Gradients:
    """Return the gradients of :func:`pst_ds.core.experts.products.backward` for sorted ``rows`` (n, I)."""
    layout, one, transposed = state.layout, state.layout.expert, state.layout.transposed
    grad_y = grad_y.contiguous()
    left, right = (rows, grad_y) if transposed else (grad_y, rows)
    stack = product(left.t(), right, routing).view(layout.shape)
    factors = factors_with_ones(state) if state.scores_train else Factors(U=state.factors.U, V=state.factors.V)
    sums = Factors(**{name: torch.empty_like(f) for name, f in factors.held().items() if name != "norms"})
    step = experts_at_once(layout, rows.element_size(), tile_bytes)
    buffers = rows.new_empty(2, step * one.numel)
    for first in range(0, layout.num_experts, step):
        experts = range(first, min(first + step, layout.num_experts))
        _experts_backward(stack, routing.ends, state, mask, experts, factors, sums, buffers)
    if state.rounding is not None:
        state.rounding.round_(stack)
    grads = Gradients()
    if need_x:
        by_output = stack.view(-1, *one.shape)
        grads.x = product(grad_y, by_output.transpose(1, 2) if transposed else by_output, routing)
    finish_factors(Factors(**{name: total.float() for name, total in sums.held().items()}), state, grads)
    return grads


def _experts_backward(
    stack: Tensor,
    ends: Tensor,
    state: LayerState,
    mask: MaskBits,
    experts: range,
    factors: Factors,
    sums: Factors,
    buffers: Tensor,
) -> None:
    """Turn G of some experts into M . W, and set their gradients of the factors in ``sums``."""
    layout, constants = state.layout, state.constants
    assert isinstance(state.weight, Tensor)
    matrices = Matrices.of_experts(layout, experts)
    matrix = layout.matrices()[experts.start * matrices.parts]
    numel, own = len(experts) * layout.expert.numel, slice(matrix.index, matrix.index + matrices.count)
    scores, updates = (
        None if getattr(sums, name) is None else buffer[:numel].view(-1, matrices.shape[1])
        for name, buffer in zip("AU", buffers, strict=True)
    )
    has_gradient = scores is not None and updates is not None and not constants.frozen_magnitude
    factor: float | Tensor = 0.0
    if has_gradient:
        inverses = torch.tensor([1.0 / scale for scale in state.magnitude_scales[own]])
        factor = stack.new_empty(matrices.count, dtype=torch.float32).copy_(inverses, non_blocking=True)
    tile = tile_factors(state.factors, layout, matrix, matrix.rect)
    height = layout.expert.shape[0]
    base, grad = (t[experts.start * height : experts.stop * height] for t in (state.weight, stack))
    gradients_into(grad, scores, updates, base, grad, mask, matrices, tile, constants, factor, ends)
    for product_grad, names in ((scores, "AB"), (updates, "UV")):
        if product_grad is not None:
            _low_rank_gradients(product_grad.view(matrices.count, *matrices.shape), layout, own, names, factors, sums)


def _low_rank_gradients(
    grad: Tensor, layout: WeightLayout, matrices: slice, names: str, factors: Factors, sums: Factors
) -> None:
    """Write grad right' and left' grad of each matrix to ``sums``. ``grad``: (matrices, rows, columns) as stored."""
    by_output = grad.transpose(1, 2) if layout.transposed else grad
    outer, inner, to_outer, to_inner = (
        getattr(of, name).view(layout.num_matrices, -1, getattr(of, name).shape[1])[matrices]
        for of in (factors, sums)
        for name in names
    )
    torch.bmm(by_output, inner.transpose(1, 2), out=to_outer)
    torch.bmm(outer.transpose(1, 2), by_output, out=to_inner)
