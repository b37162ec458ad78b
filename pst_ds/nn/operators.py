"""Layers as operators of ``torch.ops.pst_ds`` with shapes and gradients, which torch.compile takes into its graphs.

``masked_linear`` is told its layer by a number in a tensor. So one graph serves all layers alike, and new masks, scales
or stages of the schedule ask for no other: the operator reads them from the layer when it runs. Eager code, and layers
that ZeRO-3 has split, do without.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from pst_ds.core.updates.rows import row_gradients, updated_rows
from pst_ds.nn.layer import FACTOR_NAMES


class Layer(Protocol):
    """What the operators call of a pruned linear layer; see :class:`pst_ds.nn.linear.PSTLinear`."""

    was_called: bool

    def product(self, x: Tensor) -> Tensor: ...
    def gradients(
        self, x: Tensor, grad_y: Tensor, *, need_x: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, ...]: ...


_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_OTHERS = ", ".join(f"Tensor? {name}" for name in ("weight", "bias", *FACTOR_NAMES, "S"))
"""What a layer may train, beside x. The operator reads the layer's; they are arguments for their gradients."""
_LIBRARY = torch.library.Library("pst_ds", "FRAGMENT")
for _schema in (
    f"masked_linear(Tensor x, Tensor number, int outputs, {_OTHERS}) -> Tensor",
    f"masked_linear_backward(Tensor grad_y, bool[] needed, Tensor x, Tensor number, {_OTHERS}) -> Tensor[]",
    "updated_rows(Tensor ids, Tensor weight, Tensor left, Tensor right, float beta, int? padding_idx) -> Tensor",
    "row_gradients(Tensor ids, Tensor grad_y, Tensor left, Tensor right, float beta, int? padding_idx) -> "
    "(Tensor, Tensor)",
):
    _LIBRARY.define(_schema)


def new_number(layer: Layer) -> Tensor:
    """Give ``layer`` a number by which the operators find it, () int64, on the CPU."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor(number, device="cpu")


def _layer(number: Tensor) -> Layer:
    return _LAYERS[int(number)]


def _masked_linear(
    x: Tensor, number: Tensor, outputs: int, weight: Tensor | None, bias: Tensor | None, *factors: Tensor | None
) -> Tensor:
    layer = _layer(number)
    layer.was_called = True
    with torch.autocast(x.device.type, enabled=False):
        return layer.product(x)


def _masked_linear_backward(
    grad_y: Tensor, needed: list[bool], x: Tensor, number: Tensor, *others: Tensor | None
) -> list[Tensor]:
    need_x, need_weight, need_bias = needed[:3]
    with torch.autocast(x.device.type, enabled=False):
        grads = _layer(number).gradients(x, grad_y, need_x=need_x, need_weight=need_weight, need_bias=need_bias)
    found = [grad for grad, is_needed in zip(grads, needed, strict=True) if is_needed]
    assert all(grad is not None for grad in found)
    return found  # type: ignore[return-value]


def _updated_rows(
    ids: Tensor, weight: Tensor, left: Tensor, right: Tensor, beta: float, padding_idx: int | None
) -> Tensor:
    # torch's own lookup, not an index: a row number of -1 is an error, as in the base embedding
    stored, own = (torch.nn.functional.embedding(ids.reshape(-1), table) for table in (weight, left))
    # detach: see PSTLinear.product
    return updated_rows(stored, own, right, beta).view(*ids.shape, stored.shape[1]).detach()


def _row_gradients(
    ids: Tensor, grad_y: Tensor, left: Tensor, right: Tensor, beta: float, padding_idx: int | None
) -> tuple[Tensor, Tensor]:
    flat = grad_y.reshape(-1, grad_y.shape[-1])
    of_left, of_right = row_gradients(ids.reshape(-1), flat, left, right, beta, padding_idx=padding_idx)
    return of_left.to(left.dtype), of_right.to(right.dtype)


for _function in (_masked_linear, _masked_linear_backward, _updated_rows, _row_gradients):
    _LIBRARY.impl(_function.__name__[1:], _function, "CompositeExplicitAutograd")


@torch.library.register_fake("pst_ds::masked_linear", lib=_LIBRARY)
def _(x: Tensor, number: Tensor, outputs: int, *others: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.register_fake("pst_ds::masked_linear_backward", lib=_LIBRARY)
def _(grad_y: Tensor, needed: list[bool], x: Tensor, number: Tensor, *others: Tensor | None) -> list[Tensor]:
    asked = (tensor for tensor, is_needed in zip((x, *others), needed, strict=True) if is_needed)
    return [tensor.new_empty(tensor.shape) for tensor in asked if tensor is not None]


@torch.library.register_fake("pst_ds::updated_rows", lib=_LIBRARY)
def _(ids: Tensor, weight: Tensor, left: Tensor, right: Tensor, beta: float, padding_idx: int | None) -> Tensor:
    return weight.new_empty((*ids.shape, weight.shape[1]))


@torch.library.register_fake("pst_ds::row_gradients", lib=_LIBRARY)
def _(
    ids: Tensor, grad_y: Tensor, left: Tensor, right: Tensor, beta: float, padding_idx: int | None
) -> tuple[Tensor, Tensor]:
    return left.new_empty(left.shape), right.new_empty(right.shape)


def _keep_layer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, number, _, *others = inputs
    ctx.save_for_backward(x, number, *others)


def _differentiate_layer(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, number, *others = ctx.saved_tensors
    need_x, _, _, *need_others = ctx.needs_input_grad
    needed = [need_x, *need_others]
    found = iter(torch.ops.pst_ds.masked_linear_backward(grad_y, needed, x, number, *others))
    of_x, *of_others = (next(found) if is_needed else None for is_needed in needed)
    return of_x, None, None, *of_others


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, _, left, right, ctx.beta, ctx.padding_idx = inputs
    ctx.save_for_backward(ids, left, right)


def _differentiate_rows(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    ids, left, right = ctx.saved_tensors
    of_left, of_right = torch.ops.pst_ds.row_gradients(ids, grad_y, left, right, ctx.beta, ctx.padding_idx)
    return None, None, of_left, of_right, None, None


torch.library.register_autograd("pst_ds::masked_linear", _differentiate_layer, setup_context=_keep_layer, lib=_LIBRARY)
torch.library.register_autograd("pst_ds::updated_rows", _differentiate_rows, setup_context=_keep_rows, lib=_LIBRARY)
