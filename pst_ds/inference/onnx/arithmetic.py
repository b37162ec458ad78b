"""Tolerance between the logits of an ONNX graph and of its model: the effect of roundings in which they differ."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.nn.layer import PSTLayer
from pst_ds.nn.model_structure import is_linear

MARGIN = 4.0
"""Factor on the measured effect: it is the largest of a few random draws, and of products only. The exponential of
softmax, norms and activations are computed in other ways too, with errors of the size of one product's."""
DRAWS = 2
"""Random draws of which the largest effect counts."""
UNIT = torch.finfo(torch.float32).eps / 2
"""Largest relative error of one rounding to fp32."""
_MOST_LEVELS = 32767
"""Steps per sign of a 16-bit activation."""
_LARGEST_SUM = 2**31 - 1
"""Largest sum of integer products, in 32 bits."""
_LARGEST_CODE = {"int8": 127, "int4": 8}
"""Largest absolute quantised weight."""


def activation_levels(values: str, inputs: int) -> int:
    """Return to how many steps per sign a product with quantised weights rounds an activation.

    Activations are 16-bit integers, or shorter ones so that a row's sum of integer products stays within 32 bits (see
    ``decoder/matrix.hpp``): 13 bits for 2,048 inputs of int8.
    """
    # of a row in which all weights have the largest value
    largest_sum_of_weights = _LARGEST_CODE[values] * max(inputs, 1)
    levels = min(_MOST_LEVELS, _LARGEST_SUM // largest_sum_of_weights)
    return max(1, levels)


class RoundedProducts:
    """A model in fp32 whose linear layers get inputs with random errors, as large as those of the graph's products.

    A sum of n products in fp32 has an error that grows like a random walk. In two orders of summation the sums differ
    by about UNIT sqrt(n) sqrt(sum of (w x)^2), which is the effect of changing each input by UNIT sqrt(n) in a random
    direction. A product with quantised weights also rounds its inputs to integers.
    """

    def __init__(self, model: nn.Module, quantised: Mapping[str, str], seed: int):
        """Wrap ``model``. ``quantised``: "int8" or "int4" of the weights, by the name of their layer."""
        self._model = model
        # on the CPU, so that every device gets the same errors
        self._generator = torch.Generator().manual_seed(seed)
        self._layers: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if is_linear(module) or isinstance(module, PSTLayer):
                self._layers[name] = module
        self._quantised = quantised

    def __call__(self, **inputs: Any) -> Any:
        hooks = []
        for name, layer in self._layers.items():
            hook = self._hook(self._quantised.get(name, ""))
            hooks.append(layer.register_forward_pre_hook(hook))
        try:
            return self._model(**inputs)
        finally:
            # the caller's model is unchanged between calls
            for handle in hooks:
                handle.remove()

    def _hook(self, values: str) -> Any:
        """Return a hook that changes the first argument of a layer. ``values``: as in :meth:`_changed`."""

        def change_input(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *others = arguments
            return self._changed(x, values), *others

        return change_input

    def _changed(self, x: Tensor, values: str) -> Tensor:
        """Return ``x`` (..., inputs) with random errors, and rounded if ``values`` names a quantised type."""
        inputs = x.shape[-1]
        signs = torch.randint(0, 2, x.shape, generator=self._generator).to(x.device, x.dtype) * 2 - 1
        changed = x * (1 + UNIT * math.sqrt(inputs) * signs)
        if values:
            step = x.abs().amax(-1, keepdim=True) / activation_levels(values, inputs)
            # a row of zeros has no step
            changed = torch.where(step > 0, (changed / step).round() * step, changed)
        return changed


def allowed_difference(effects: list[float], largest_logit: float) -> float:
    """Return the largest difference of a logit that the arithmetic explains.

    Args:
        effects: largest change of a logit by :class:`RoundedProducts`, for each draw.
        largest_logit: largest absolute logit; a result itself is rounded, too.
    """
    rounding_of_result = UNIT * largest_logit
    return MARGIN * (max(effects) + rounding_of_result)
