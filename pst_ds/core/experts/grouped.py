"""Products with all experts of a stack at once, without waiting for the device: torch's grouped products of bf16.

Grouped products read the ends of the experts' rows on the device. In the backward pass G = dL/d(M . W) of the whole
stack is one grouped product, and becomes M . W in place.
"""

from collections.abc import Sequence
from typing import Any

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
    layout = state.layout
    one = state.layout.expert
    transposed = state.layout.transposed
    assert isinstance(state.weight, Tensor)
    grad_y = grad_y.contiguous()
    left, right = (rows, grad_y) if transposed else (grad_y, rows)
    stack = product(left.t(), right, routing).view(layout.shape)
    factors = factors_with_ones(state) if state.scores_train else Factors(U=state.factors.U, V=state.factors.V)
    totals: dict[str, Any] = {name: torch.empty_like(f) for name, f in factors.held().items() if name != "norms"}
    sums = Factors(**totals)
    has_gradient = sums.A is not None and sums.U is not None and not state.constants.frozen_magnitude
    inverses = torch.tensor([1.0 / scale for scale in state.magnitude_scales])
    scales = stack.new_empty(len(inverses), dtype=torch.float32).copy_(inverses, non_blocking=True)
    step = experts_at_once(layout, rows.element_size(), tile_bytes)
    buffers = rows.new_empty(2, step * one.numel)
    for first in range(0, layout.num_experts, step):  # turn G into M . W
        experts = range(first, min(first + step, layout.num_experts))
        matrices = Matrices.of_experts(layout, experts)
        matrix = layout.matrices()[first * matrices.parts]
        stored = slice(first * one.shape[0], experts.stop * one.shape[0])
        indices = slice(matrix.index, matrix.index + matrices.count)  # of these experts' matrices in the layer
        scores, updates = (
            None if total is None else buffer[: len(experts) * one.numel].view(-1, matrices.shape[1])
            for total, buffer in zip((sums.A, sums.U), buffers, strict=True)
        )
        tile = tile_factors(state.factors, layout, matrix, matrix.rect)
        grad = stack[stored]
        factor = scales[indices] if has_gradient else 0.0
        places = mask, matrices, tile, state.constants, factor, routing.ends
        gradients_into(grad, scores, updates, state.weight[stored], grad, *places)
        for values, names in ((scores, "AB"), (updates, "UV")):
            if values is not None:
                _low_rank_gradients(values.view(matrices.count, *matrices.shape), layout, indices, names, factors, sums)
    if state.rounding is not None:
        state.rounding.round_(stack)
    grads = Gradients()
    if need_x:
        by_output = stack.view(-1, *one.shape)
        grads.x = product(grad_y, by_output.transpose(1, 2) if transposed else by_output, routing)
    in_fp32: dict[str, Any] = {name: total.float() for name, total in totals.items()}
    finish_factors(Factors(**in_fp32), state, grads)
    return grads


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
