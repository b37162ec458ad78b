"""The low-rank update of a layer for one user, which can be trained: y = layer(x) + beta (x V') U'.

Layers are not replaced but get a forward hook. The native decoder computes the updates of many users in one batch.
"""

import torch
from torch import Tensor, nn

from pst_ds.core.updates.rows import beside
from pst_ds.nn.layer import seeded_normal

LEFT, RIGHT = "personal_U", "personal_V"
"""Parameter names of a layer's U (O, r) and V (r, I)."""


def add_update(
    layer: nn.Module, name: str, *, outputs: int, inputs: int, rank: int, beta: float, seed: int, dtype: torch.dtype,
    device: torch.device,
) -> dict[str, nn.Parameter]:  # fmt: skip
    """Add a trainable update to ``layer``; return U, initially 0, and V, drawn from ``seed`` and ``name``, by name.

    Call it before ``deepspeed.initialize``, which partitions them like the layer's other parameters.
    """
    right = seeded_normal((rank, inputs), 1.0, f"{seed}/{name}/{RIGHT}") / inputs**0.5
    made = {LEFT: torch.zeros(outputs, rank), RIGHT: right}
    params = {part: nn.Parameter(values.to(device=device, dtype=dtype)) for part, values in made.items()}
    for part, param in params.items():
        layer.register_parameter(part, param)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        left, right = (module.get_parameter(part) for part in (LEFT, RIGHT))
        return output + beside(args[0].to(output.dtype), left, right, beta)

    layer.register_forward_hook(hook)
    return {f"{name}.{part}": param for part, param in params.items()}
