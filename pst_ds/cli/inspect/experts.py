"""Zeros and tokens of every expert of a stack for ``pst-ds inspect``."""

from collections.abc import Sequence

from torch import Tensor

from pst_ds.cli.inspect.text import Facts, Layer
from pst_ds.core.bits import unpack_range
from pst_ds.core.experts.tokens import hardly_used


def zeros_of_experts(bits: Tensor, weights: int, num_shards: int, num_experts: int) -> list[int]:
    """Return the pruned weights of each expert in the mask ``bits`` of a stack of so many ``weights``."""
    each = weights // num_experts
    kept = (unpack_range(bits, weights, num_shards, i * each, (i + 1) * each) for i in range(num_experts))
    return [each - int(of_expert.sum()) for of_expert in kept]


def add_experts(layer: Layer, zeros: Sequence[int], tokens: Sequence[int] = ()) -> None:
    """Add the pruned weights of each expert to a stack's description, and its ``tokens`` if known."""
    layer["expert_zeros"] = list(zeros)
    if tokens:
        layer["expert_tokens"] = list(tokens)


def usage(layers: Sequence[Layer]) -> Facts:
    """Return how much of the pruning falls on experts that were hardly used; nothing where no tokens are known.

    Shares refer to all weights, and all pruned weights, of the stacks.
    """
    modules: dict[str, set[int]] = {}
    number = weights = zeros = weights_there = zeros_there = 0
    for layer in layers:
        tokens, of_experts = layer.get("expert_tokens"), layer.get("expert_zeros")
        if not tokens or not of_experts:
            continue
        module = layer["name"].rpartition(".")[0]
        hardly = set(hardly_used(tokens))
        number += 0 if module in modules else len(tokens)
        modules[module] = hardly
        weights, zeros = weights + layer["weights"], zeros + sum(of_experts)
        weights_there += len(hardly) * layer["weights"] // len(tokens)
        zeros_there += sum(of_experts[i] for i in hardly)
    if not number:
        return {}
    return {
        "hardly_used_experts": {
            "number": sum(map(len, modules.values())),
            "of": number,
            "share_of_weights": weights_there / weights,
            "share_of_zeros": zeros_there / zeros if zeros else 0.0,
        }
    }
