"""The low-rank update of a layer for one user, which can be trained: y = layer(x) + beta (x V') U'.

Layers are not replaced but get a forward hook. The native decoder computes the updates of many users in one batch.
"""

import torch
from torch import Tensor, nn

from pst_ds.core.updates.beside import beside
from pst_ds.nn.layer import seeded_normal

LEFT = "personal_U"
"""Parameter name of a layer's U, (O, r)."""
RIGHT = "personal_V"
"""Parameter name of a layer's V, (r, I)."""


def add_update(
    layer: nn.Module,
    name: str,
    *,
    outputs: int,
    inputs: int,
    rank: int,
    beta: float,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, nn.Parameter]:
    """Add a trainable update to ``layer``; return U, initially 0, and V, drawn from ``seed`` and ``name``, by name.

    Call it before ``deepspeed.initialize``, which partitions them like the layer's other parameters.
    """
    # With these deviations x V' is about as large as an input. U = 0 leaves the model unchanged before the first step.
    initial = {
        LEFT: torch.zeros(outputs, rank),
        RIGHT: seeded_normal((rank, inputs), 1.0, f"{seed}/{name}/{RIGHT}") / inputs**0.5,
    }
    params: dict[str, nn.Parameter] = {}
    for part, values in initial.items():
        param = nn.Parameter(values.to(device=device, dtype=dtype))
        layer.register_parameter(part, param)
        params[f"{name}.{part}"] = param

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # Read from the module at each call, since a copy or a move of the model may replace its parameters.
        left = module.get_parameter(LEFT)
        right = module.get_parameter(RIGHT)
        return output + beside(args[0].to(output.dtype), left, right, beta)

    layer.register_forward_hook(hook)
    return params
