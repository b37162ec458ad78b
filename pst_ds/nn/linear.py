"""PSTLinear: a linear layer that multiplies with M . (W0 + beta U V) and learns which weights to keep.

torch.compile puts it into its graphs as the operator ``torch.ops.pst_ds.masked_linear``, which finds its layer by a
number in a tensor. So one graph serves all layers, and new masks, scales or stages of the schedule need no other: the
operator reads them from the layer when it runs. Eager code, and layers that ZeRO-3 partitions, do not use it.
"""

import itertools
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pst_ds.core import masked_linear
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import sharding

_MOST_FACTORS = 10
"""Most factors of a layer in a graph: four of the scores, and an update's. Layers with more end the graph."""
_FACTORS = [f"factor{number}" for number in range(_MOST_FACTORS)]
_OTHERS = ", ".join(f"Tensor? {name}=None" for name in ("weight", "bias", *_FACTORS))
"""Parameters that a layer may train. The operator reads the layer's; they are arguments to get gradients."""
LIBRARY = torch.library.Library("pst_ds", "FRAGMENT")
LIBRARY.define(f"masked_linear(Tensor x, Tensor number, int outputs, {_OTHERS}) -> Tensor")
LIBRARY.define(f"masked_linear_backward(Tensor grad_y, bool[] needed, Tensor x, Tensor number, {_OTHERS}) -> Tensor[]")


class PSTLinear(PSTLayer):
    """Replacement of an ``nn.Linear`` or ``Conv1D``: y = x (M . W)' + b."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.in_features = self.layout.in_features
        self.out_features = self.layout.out_features
        self._number = _new_number(self)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., I) to (..., O), in the weight's dtype, also under autocast."""
        x = input  # nn.Linear's name for it
        if self.bypassed:
            dense = self.dense_weight()
            if self.layout.transposed:
                dense = dense.t()  # (O, I)
            with torch.autocast(x.device.type, enabled=False):
                return torch.nn.functional.linear(x.to(dense.dtype), dense, self.bias)
        if not torch.compiler.is_compiling():
            return self._eager(x)
        weight, factors = self.trained()
        # ZeRO-3's hooks end graphs here anyway
        if sharding.is_partitioned(self.pst_mask) or len(factors) > _MOST_FACTORS:
            return torch.compiler.disable(self._eager)(x)
        factors += [None] * (_MOST_FACTORS - len(factors))  # the operator has a fixed number of arguments
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(self.dtype)
        return torch.ops.pst_ds.masked_linear(x, self._number, self.out_features, weight, self.bias, *factors)

    def _eager(self, x: Tensor) -> Tensor:
        if not self.was_called:  # setting an attribute of a module is slow
            self.was_called = True
        self.keep_if_recomputed()
        weight, factors = self.trained()
        if not torch.is_autocast_enabled(x.device.type):
            return _MaskedLinear.apply(x, self, weight, self.bias, *factors)
        with torch.autocast(x.device.type, enabled=False):
            return _MaskedLinear.apply(x.to(self.dtype), self, weight, self.bias, *factors)

    def product(self, x: Tensor) -> Tensor:
        """Return x (M . W)' + bias for x (..., I): (..., O), without gradient. The parameters must be gathered."""
        bias = None if self.bias is None else self.bias.detach()
        # Some products are views, which autograd lets no one modify once a Function has returned them; the result of
        # detach is not a view to it. Flattening x would do too, but is not bit-identical to nn.Linear.
        return masked_linear.forward(x.detach(), bias, self.state()).detach()

    def gradients(
        self, x: Tensor, grad_y: Tensor, *, need_x: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x (..., I), the weight, the bias, and of :attr:`factor_names`, for ``grad_y``
        (..., O). Gathers released parameters."""
        x_rows = x.reshape(-1, x.shape[-1])  # (tokens, I)
        grad_rows = grad_y.reshape(-1, grad_y.shape[-1])  # (tokens, O)
        if self.listen is not None:
            self.listen(x_rows, grad_rows)
        backward = partial(masked_linear.backward, need_x=need_x, need_weight=need_weight, need_bias=need_bias)
        grads = self.gathered_gradients(partial(backward, x_rows, grad_rows))
        grad_x = grads.x
        if grad_x is not None:
            grad_x = grad_x.to(x.dtype).view(x.shape)
        grad_bias = grads.bias
        if grad_bias is not None:
            grad_bias = grad_bias.to(self.dtype)  # from the higher precision of its sum
        return grad_x, grads.weight, grad_bias, *self.of_trained(grads)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._number = _new_number(self)  # torch.compile's graphs must tell a copy from the original

    def extra_repr(self) -> str:
        fused = f", parts={self.layout.num_matrices}" if self.layout.num_matrices > 1 else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{fused}"


class _MaskedLinear(torch.autograd.Function):
    """Save only x; the backward pass reads weight, mask and factors from the layer, where ZeRO-3 gathers them again."""

    @staticmethod
    def forward(ctx, x, layer, weight, bias, *factors):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer.product(x)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        need_x, _, need_weight, need_bias = ctx.needs_input_grad[:4]
        of_x, *others = ctx.layer.gradients(x, grad_y, need_x=need_x, need_weight=need_weight, need_bias=need_bias)
        return of_x, None, *others


_LAYERS: weakref.WeakValueDictionary[int, PSTLinear] = weakref.WeakValueDictionary()
"""Layers by number. Weak references: a layer must not outlive its model because a graph once called it."""
_NUMBERS = itertools.count()


def _new_number(layer: PSTLinear) -> Tensor:
    """Return a number by which the operators find ``layer``, () int64, on the CPU.

    A tensor, because torch.compile would make a graph for each value of an int. On the CPU, so that reading it does not
    wait for a device.
    """
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return torch.tensor(number, device="cpu")


def _forward(
    x: Tensor, number: Tensor, outputs: int, weight: Tensor | None, bias: Tensor | None, *factors: Tensor | None
) -> Tensor:
    """Compute ``masked_linear``. The parameters among the arguments are for autograd; the layer's are read."""
    layer = _LAYERS[int(number)]
    layer.was_called = True
    with torch.autocast(x.device.type, enabled=False):
        return layer.product(x)


def _backward(
    grad_y: Tensor, needed: list[bool], x: Tensor, number: Tensor, *others: Tensor | None
) -> list[Tensor | None]:
    need_x, need_weight, need_bias = needed[:3]
    layer = _LAYERS[int(number)]
    with torch.autocast(x.device.type, enabled=False):
        grads = layer.gradients(x, grad_y, need_x=need_x, need_weight=need_weight, need_bias=need_bias)
    # An operator cannot return None in a list of tensors, so gradients that nobody needs are omitted. The end of
    # ``needed`` is about factors that this layer lacks, which have no gradient: hence not strict.
    return [grad for grad, is_needed in zip(grads, needed, strict=False) if is_needed]


LIBRARY.impl("masked_linear", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("masked_linear_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("pst_ds::masked_linear", lib=LIBRARY)
def _(x: Tensor, number: Tensor, outputs: int, *others: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.register_fake("pst_ds::masked_linear_backward", lib=LIBRARY)
def _(grad_y: Tensor, needed: list[bool], x: Tensor, number: Tensor, *others: Tensor | None) -> list[Tensor]:
    gradients = []
    for tensor, is_needed in zip((x, *others), needed, strict=True):
        if is_needed and tensor is not None:
            gradients.append(tensor.new_empty(tensor.shape))
    return gradients


def _save(ctx, inputs, output):
    x, number, _, *others = inputs
    ctx.save_for_backward(x, number, *others)


def _differentiate(ctx, grad_y):
    x, number, *others = ctx.saved_tensors
    need_x, _, _, *need_others = ctx.needs_input_grad
    needed = [need_x, *need_others]
    computed = iter(torch.ops.pst_ds.masked_linear_backward(grad_y, needed, x, number, *others))
    of_x, *of_others = (next(computed) if is_needed else None for is_needed in needed)
    return of_x, None, None, *of_others  # the number and the outputs' size have no gradient


torch.library.register_autograd("pst_ds::masked_linear", _differentiate, setup_context=_save, lib=LIBRARY)
