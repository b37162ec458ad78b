"""PSTLinear: a linear layer that multiplies with M . (W0 + beta U V) and learns which weights to keep."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pst_ds.core import masked_linear
from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.operators import new_number
from pst_ds.parallel import zero3


class PSTLinear(PSTLayer):
    """Replacement of an ``nn.Linear`` or ``Conv1D``: y = x (M . W)' + b."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.in_features, self.out_features = self.layout.in_features, self.layout.out_features
        self._number = new_number(self)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., I) to (..., O), in the weight's dtype, also under autocast."""
        x = input  # nn.Linear's name for it
        if self.bypassed:
            return self._dense(x)
        if not torch.compiler.is_compiling():
            return self._eager(x)
        if zero3.is_partitioned(self.pst_mask):  # ZeRO-3's hooks end graphs here anyway
            return torch.compiler.disable(self._eager)(x)
        weight, factors = self.trained()
        x = x.to(self.dtype) if torch.is_autocast_enabled(x.device.type) else x
        return torch.ops.pst_ds.masked_linear(x, self._number, self.out_features, weight, self.bias, *factors)

    def _eager(self, x: Tensor) -> Tensor:
        if not self.was_called:
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
        # Some products are views, which autograd lets no one modify once a Function has returned them; to autograd,
        # what detach returns is not a view. Two dimensions would do too, but not bit for bit as nn.Linear multiplies.
        return masked_linear.forward(x.detach(), bias, self.state()).detach()

    def gradients(
        self, x: Tensor, grad_y: Tensor, *, need_x: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x (..., I), the weight, the bias, and of :data:`FACTOR_NAMES` and S, for
        ``grad_y`` (..., O). Gathers what ZeRO-3 has released."""
        x_rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
        backward = partial(masked_linear.backward, need_x=need_x, need_weight=need_weight, need_bias=need_bias)
        grads = self.gathered_gradients(partial(backward, x_rows, grad_rows))
        grad_x = None if grads.x is None else grads.x.to(x.dtype).view(x.shape)
        grad_bias = None if grads.bias is None else grads.bias.to(self.dtype)
        return grad_x, grads.weight, grad_bias, *self.of_trained(grads)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which torch.compile's graphs have to tell from the original."""
        super().__setstate__(state)
        self._number = new_number(self)

    def _dense(self, x: Tensor) -> Tensor:
        weight = self.weight if self.base_codes is None else self.base_codes.whole(self.dtype).dense()
        assert weight is not None
        weight_by_output = weight.t() if self.layout.transposed else weight
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(x.to(weight.dtype), weight_by_output, self.bias)

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
