"""SPP: a multiplicative update, which keeps every zero of W0 (arXiv 2405.16057)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pst_ds.core.forms.form import ParamSpec, Tile, UpdateForm, UpdateSettings

GROUPS = 16
"""Runs of consecutive outputs of a matrix; those of a run share a row of V."""
SCALE = 2.0
"""Factor of the update, besides ``pst.beta``."""


class SPP(UpdateForm):
    """W = W0 + beta SCALE W0 * (repeat(V) u 1') with U = u (O,) and V (GROUPS, I), of which each row is repeated.

    ``pst.update_rank`` has no effect. u starts at zero, so that training starts at W0.
    """

    # Of the rates tried on film reviews, 3e-2 was the best where U V has 2e-3.
    rate_factor = 15.0

    def parameters(self, outputs: int, inputs: int, settings: UpdateSettings) -> Mapping[str, ParamSpec | None]:
        return {
            "U": ParamSpec((outputs,)),
            # The deviation of Kaiming-uniform values with a = sqrt(5), as LoRA initialises.
            "V": ParamSpec((GROUPS, inputs), std=1.0 / math.sqrt(3.0 * inputs)),
        }

    def apply(self, weight: Tensor, parameters: Mapping[str, Tensor], tile: Tile, beta: float) -> Tensor:
        by_output = parameters["U"][tile.outputs].unsqueeze(1)
        groups = group_of_outputs(tile.num_outputs, weight.device)[tile.outputs]
        repeated = parameters["V"][groups, tile.inputs]
        # One product after another, so that a weight is rounded alike in every tile.
        return weight + weight * (repeated * by_output) * (beta * SCALE)


def group_of_outputs(num_outputs: int, device: torch.device | None = None) -> Tensor:
    """Return the group of each output of a matrix, (num_outputs,) int64.

    Group g starts at output floor(g num_outputs / GROUPS), so sizes differ by one at most.
    """
    numbers = torch.arange(num_outputs, device=device)
    return ((numbers + 1) * GROUPS - 1) // num_outputs
