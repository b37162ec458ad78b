"""y = x (M . W)' with the experts of a stack, and its gradient.

On a GPU, a product is one of all experts (:mod:`pst_ds.core.experts.grouped`). Elsewhere, merged weights and buffers of
the backward pass belong to one expert at a time; only gradients of weights that are trained in full have the size of
the stack. Gradients are zero for experts without a token.
"""

import torch
from torch import Tensor

from pst_ds.core import masked_linear
from pst_ds.core.experts import grouped
from pst_ds.core.experts.routing import Routing
from pst_ds.core.masked_linear import Gradients, LayerState


def forward(x: Tensor, state: LayerState, routing: Routing, *, by_token: bool) -> Tensor:
    """Return y = x (M . W)' of the expert of each pair, (N*k, O) in the order of the experts.

    ``x``: (N, I) if ``by_token``, or (N*k, I) in the order of the experts. ``state``: of the whole stack.
    """
    of_expert = state.layout.expert
    transposed = state.layout.transposed
    if grouped.merges(state.layout, state.weight.dtype, x.device.type):
        stack = state.masked_weight().view(-1, *of_expert.shape)
        return dense_forward(x, stack, routing, by_token=by_token, transposed=transposed)
    # The runs of all experts together cover every row.
    y = x.new_empty(routing.order.numel(), of_expert.out_features)
    for expert, rows in routing.runs():
        masked_linear.forward_into(y[rows], routing.rows_of(x, rows, by_token), state.expert(expert))
    return y


def dense_forward(x: Tensor, stack: Tensor, routing: Routing, *, by_token: bool, transposed: bool) -> Tensor:
    """Return the same with an unmasked ``stack``: (E, O, I), or (E, I, O) if ``transposed``."""
    by_input = stack
    if not transposed:
        by_input = stack.transpose(1, 2)
    if grouped.serves(x, stack.dtype, by_input.shape[1:]):
        sorted_x = x
        if by_token:
            sorted_x = routing.sorted_rows(x)
        return grouped.product(sorted_x, by_input, routing)
    y = x.new_empty(routing.order.numel(), by_input.shape[2])
    for expert, rows in routing.runs():
        torch.mm(routing.rows_of(x, rows, by_token), by_input[expert], out=y[rows])
    return y


def backward(
    x: Tensor,
    grad_y: Tensor,
    state: LayerState,
    routing: Routing,
    *,
    by_token: bool,
    need_x: bool,
    need_weight: bool = False,
    tile_bytes: int = 0,
) -> Gradients:
    """Return the gradients of :func:`forward`, as :func:`pst_ds.core.masked_linear.backward` does for one matrix.

    The gradient of x has its shape. The others cover the whole stack and are zero for experts without a token.
    """
    layout = state.layout
    grads = Gradients()
    mask = None
    if len(x) and not need_weight:  # kernels do not write G . M, and grouped products need a row
        mask = masked_linear.mask_for_kernels(x, state)
    if mask is not None and grouped.merges(layout, x.dtype, x.device.type):
        sorted_x = x
        if by_token:
            sorted_x = routing.sorted_rows(x)
        grads = grouped.backward(sorted_x, grad_y, state, routing, mask, need_x=need_x, tile_bytes=tile_bytes)
        if grads.x is not None and by_token:
            grads.x = routing.summed(grads.x)
        return grads
    if need_x:
        grads.x = grad_y.new_empty(grad_y.shape[0], layout.in_features)
    whole = _zeros(state, need_weight=need_weight)
    for expert, rows in routing.runs():
        of_expert = masked_linear.backward(
            routing.rows_of(x, rows, by_token),
            grad_y[rows],
            state.expert(expert),
            need_x=need_x,
            need_weight=need_weight,
            need_bias=False,
            tile_bytes=tile_bytes,
        )
        if grads.x is not None:
            assert of_expert.x is not None
            grads.x[rows] = of_expert.x
        # Factors and stored weights of a stack are in expert order, so an expert's gradient has consecutive rows.
        for name, total in whole.items():
            share = total.shape[0] // layout.num_experts
            term = of_expert.of_parameter(name)
            assert term is not None
            total[expert * share : (expert + 1) * share] = term
    for name, total in whole.items():
        if name in state.factors.update:
            grads.update[name] = total
        else:
            setattr(grads, name, total)
    if grads.x is not None and by_token:
        grads.x = routing.summed(grads.x)
    return grads


def dense_backward(grad_y: Tensor, stack: Tensor, routing: Routing, *, by_token: bool, transposed: bool) -> Tensor:
    """Return the gradient of x in :func:`dense_forward`."""
    # dX = dY W is the same product with the stack transposed, and dY is already in the order of the experts.
    grad_x = dense_forward(grad_y, stack, routing, by_token=False, transposed=not transposed)
    if by_token:
        return routing.summed(grad_x)
    return grad_x


def _zeros(state: LayerState, *, need_weight: bool) -> dict[str, Tensor]:
    """Return zero gradients of a stack by name: of its factors, and of its weights if these train."""
    factors = {name: factor for name, factor in state.factors.held().items() if name != "norms"}
    factors |= state.factors.update
    gradients: dict[str, Tensor] = {}
    for name, factor in factors.items():
        high = torch.promote_types(factor.dtype, torch.float32)
        gradients[name] = torch.zeros_like(factor, dtype=high)
    if need_weight:
        gradients["weight"] = torch.zeros(state.layout.shape, dtype=state.weight.dtype, device=state.weight.device)
    return gradients
