"""Descriptions of layers for ``pst-ds inspect``: trained parameters, masks, and the experts of a stack."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pst_ds.cli.inspect.text import Facts, Layer, sparsity_of
from pst_ds.core.bits import unpack_range
from pst_ds.core.experts.tokens import hardly_used

_OUTPUTS, _INPUTS = "ARU", "BCV"
"""Factors with a row per output of their layer, and with a column per input."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Mask:
    """The mask of a layer."""

    weights: int
    zeros: int
    nbytes: int


def trained_layers(
    trained: Shapes, masks: Mapping[str, Mask], pattern_of: Callable[[str], str], bytes_each: int
) -> list[Layer]:
    """Describe every module with trained parameters (``bytes_each`` on disk) or a mask."""
    counts: dict[str, int] = {}
    for name, shape in trained.items():
        owner = name.rpartition(".")[0]
        counts[owner] = counts.get(owner, 0) + math.prod(shape)
    layers: list[Layer] = []
    for name in {**counts, **masks}:
        mask, count = masks.get(name), counts.get(name, 0)
        layer: Layer = {
            "name": name,
            "shape": matrix_shape(name, trained),
            "dtype": "",
            "pattern": pattern_of(name) if mask else "",
            "weights": mask.weights if mask else count,
            "zeros": mask.zeros if mask else None,
            "bytes": bytes_each * count + (mask.nbytes if mask else 0),
            "trained": count,
        }
        layers.append(layer)
    return layers


def matrix_shape(name: str, trained: Shapes) -> list[int] | None:
    """Return the shape of a trained weight, or (O, I) from the factors; None without either."""
    if f"{name}.weight" in trained:
        return list(trained[f"{name}.weight"])
    outputs, inputs = (
        [trained[f"{name}.pst_{factor}"] for factor in factors if f"{name}.pst_{factor}" in trained]
        for factors in (_OUTPUTS, _INPUTS)
    )
    return [outputs[0][0], inputs[0][-1]] if outputs and inputs else None


def totals(layers: list[Layer]) -> Facts:
    """Return facts about all layers together."""
    pruned = [layer for layer in layers if layer["zeros"] is not None]
    return {
        "sparsity_measured": sparsity_of(pruned),
        "pruned_weights": sum(layer["weights"] for layer in pruned),
        "trained_parameters": sum(layer["trained"] for layer in layers),
    }


def zeros_of_experts(bits: Tensor, weights: int, num_shards: int, num_experts: int) -> list[int]:
    """Return the number of pruned weights of each expert, from the mask ``bits`` of a stack with ``weights``
    weights.
    """
    each = weights // num_experts
    kept = (unpack_range(bits, weights, num_shards, i * each, (i + 1) * each) for i in range(num_experts))
    return [each - int(of_expert.sum()) for of_expert in kept]


def add_experts(layer: Layer, zeros: Sequence[int], tokens: Sequence[int] = ()) -> None:
    """Add the pruned weights of each expert to a stack's description, and its ``tokens`` if known."""
    layer["expert_zeros"] = list(zeros)
    if tokens:
        layer["expert_tokens"] = list(tokens)


def usage(layers: Sequence[Layer]) -> Facts:
    """Return how much of the pruning falls on rarely used experts; empty if no tokens are known.

    Fractions refer to all weights, and to all pruned weights, of the stacks.
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
