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
    """Return whether torch has a grouped product for matrices of ``shape``."""
    return device_type != "cpu" and dtype == torch.bfloat16 and all(size % _MULTIPLE == 0 for size in shape)


def experts_at_once(layout: WeightLayout, itemsize: int, tile_bytes: int) -> int:
    """Return how many experts' dS and dW the backward pass holds, for a budget of ``tile_bytes`` (0 is the default)."""
    budget = tile_bytes or DEFAULT_TILE_BYTES["cuda"]
    # Two buffers, one for dS and one for dW.
    return min(layout.num_experts, max(1, budget // (2 * itemsize * layout.expert.numel)))


def product(left: Tensor, right: Tensor, routing: Routing) -> Tensor:
    """Return (n, I) @ (E, I, O), the products of rows with their experts, or (O, n) @ (n, I), of the experts' parts.

    The latter is (E, O, I), and not defined for experts without rows (github.com/pytorch/pytorch/issues/172439).
    """
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped_mm is None:  # torch 2.9 has it under a private name
        grouped_mm = torch._grouped_mm
    return grouped_mm(left, right, offs=routing.ends)


def backward(
    rows: Tensor, grad_y: Tensor, state: LayerState, routing: Routing, mask: MaskBits, *, need_x: bool, tile_bytes: int
) -> Gradients:
    """Return the gradients of :func:`pst_ds.core.experts.products.backward` for sorted ``rows`` (n, I)."""
    layout = state.layout
    of_expert = layout.expert
    assert isinstance(state.weight, Tensor)
    grad_y = grad_y.contiguous()
    # G of the whole stack, which the kernel turns into M . W in place, a few experts at a time.
    if layout.transposed:
        stack = product(rows.t(), grad_y, routing).view(layout.shape)
    else:
        stack = product(grad_y.t(), rows, routing).view(layout.shape)
    factors = state.factors.of_update()
    if state.scores_train:
        factors = factors_with_ones(state)
    totals: dict[str, Any] = {name: torch.empty_like(f) for name, f in factors.held().items() if name != "norms"}
    sums = Factors(**totals)
    # Copied without waiting for the device, as everything here.
    inverses = torch.tensor([1.0 / scale for scale in state.magnitude_scales])
    scales = stack.new_empty(len(inverses), dtype=torch.float32).copy_(inverses, non_blocking=True)
    # |W| has a gradient through the scores only, and only the update passes it on.
    magnitude_has_gradient = sums.A is not None and sums.U is not None and not state.constants.frozen_magnitude
    step = experts_at_once(layout, rows.element_size(), tile_bytes)
    score_buffer = rows.new_empty(step * of_expert.numel) if sums.A is not None else None
    update_buffer = rows.new_empty(step * of_expert.numel) if sums.U is not None else None
    for first in range(0, layout.num_experts, step):
        experts = range(first, min(first + step, layout.num_experts))
        matrices = Matrices.of_experts(layout, experts)
        first_matrix = layout.matrices()[first * matrices.parts]
        # These experts' rows of the stored stack, and their matrices in the layer.
        stored = slice(first * of_expert.shape[0], experts.stop * of_expert.shape[0])
        indices = slice(first_matrix.index, first_matrix.index + matrices.count)
        numel = len(experts) * of_expert.numel
        score_gradients = None
        if score_buffer is not None:
            score_gradients = score_buffer[:numel].view(-1, matrices.shape[1])
        update_gradients = None
        if update_buffer is not None:
            update_gradients = update_buffer[:numel].view(-1, matrices.shape[1])
        gradients_into(
            merged=stack[stored],
            scores=score_gradients,
            updates=update_gradients,
            weight=state.weight[stored],
            grad=stack[stored],
            mask=mask,
            matrices=matrices,
            tile=tile_factors(state.factors, layout, first_matrix, first_matrix.rect),
            constants=state.constants,
            factor=scales[indices] if magnitude_has_gradient else 0.0,
            ends=routing.ends,
        )
        for gradients, names in ((score_gradients, ("A", "B")), (update_gradients, ("U", "V"))):
            if gradients is not None:
                by_matrix = gradients.view(matrices.count, *matrices.shape)
                _low_rank_gradients(by_matrix, layout, indices, names, factors=factors, sums=sums)
    if state.rounding is not None:
        state.rounding.round_(stack)
    grads = Gradients()
    if need_x:
        by_output = stack.view(-1, *of_expert.shape)
        if layout.transposed:
            by_output = by_output.transpose(1, 2)
        grads.x = product(grad_y, by_output, routing)
    in_fp32: dict[str, Any] = {name: total.float() for name, total in totals.items()}
    finish_factors(Factors(**in_fp32), state, grads)
    return grads


def _low_rank_gradients(
    grad: Tensor, layout: WeightLayout, matrices: slice, names: tuple[str, str], factors: Factors, sums: Factors
) -> None:
    """Write grad right' and left' grad of each matrix to ``sums``. ``grad``: (matrices, rows, columns) as stored."""
    by_output = grad
    if layout.transposed:
        by_output = grad.transpose(1, 2)

    def of_matrices(factor: Tensor) -> Tensor:
        return factor.view(layout.num_matrices, -1, factor.shape[1])[matrices]

    left_name, right_name = names
    left = of_matrices(getattr(factors, left_name))  # (matrices, outputs, rank)
    right = of_matrices(getattr(factors, right_name))  # (matrices, rank, inputs)
    torch.bmm(by_output, right.transpose(1, 2), out=of_matrices(getattr(sums, left_name)))
    torch.bmm(left.transpose(1, 2), by_output, out=of_matrices(getattr(sums, right_name)))
