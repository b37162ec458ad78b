"""Gradients of whole weights, for criteria that rank by them; collected in the backward pass."""

from functools import partial

import torch
from torch import Tensor, nn

from pst_ds.errors import InputError
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel.ranks import sum_over_ranks


class WeightGradients:
    """Add up dL/d(M . W) of every pruned layer, from now until :meth:`close`.

    Every rank holds 4 bytes for each weight of every pruned layer meanwhile, which is why callers listen only in the
    steps that end with a mask update. Raises InputError for stacks of experts, whose inputs differ by expert.
    """

    def __init__(self, model: nn.Module):
        self._layers = pst_layers(model)
        self._sums: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            if layer.layout.num_experts > 1:
                raise InputError(
                    f"{name} is a stack of experts, and criteria cannot have gradients of these. Use another criterion"
                )
            layer.listen = partial(self._add, name)

    @torch.no_grad()
    def _add(self, name: str, inputs: Tensor, output_gradients: Tensor) -> None:
        """Add what the tokens of one backward pass contribute. ``inputs``: (N, I), ``output_gradients``: (N, O)."""
        inputs = inputs.float()
        output_gradients = output_gradients.float()
        if self._layers[name].layout.transposed:
            gradient = inputs.t() @ output_gradients
        else:
            gradient = output_gradients.t() @ inputs
        if name in self._sums:
            self._sums[name] += gradient
        else:
            self._sums[name] = gradient

    def of_all_ranks(self, device: torch.device) -> dict[str, Tensor]:
        """Return the sums over ranks: fp32 in storage shape on ``device``, by layer name.

        Zero for a layer that no rank has called. Collective: one sum for each layer.
        """
        gradients = {}
        for name, layer in self._layers.items():
            # Every rank takes part for every layer: a rank without tokens for one adds zeros.
            own = self._sums.pop(name, None)
            if own is None:
                own = torch.zeros(layer.layout.shape, device=device)
            gradients[name] = sum_over_ranks(own.to(device))
        return gradients

    def close(self) -> None:
        """Stop listening, and forget the sums."""
        self._sums.clear()
        for layer in self._layers.values():
            layer.listen = None
