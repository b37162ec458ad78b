"""Sparsity of each layer by how much the loss of a language model increases without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pst_ds.core.one_shot.saliency import LEAST_KEPT, saliency_scores, score_histogram, zeros_by_saliency
from pst_ds.core.select import prune_count
from pst_ds.errors import InputError
from pst_ds.prune.blocks import block_of, find_blocks
from pst_ds.prune.budgets import ranked_together, require_movable, share_of
from pst_ds.prune.output_gradients import LayerNorms, layer_norms
from pst_ds.prune.replay import Batch
from pst_ds.prune.rules import LayerRule

LEAST_FACTOR = 1e-3
"""Smallest factor of an output, relative to the mean."""


def rules_by_saliency(
    model: nn.Module,
    rules: Sequence[LayerRule],
    batches: Sequence[Batch],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[LayerRule]:
    """Return the ``rules`` with shares of zeros by layer; the model stays as it was.

    All weights of the layers whose share may move are ranked together by |W_ij| ||x_j|| ||g_i||, and each layer gets
    the share that it has of the smallest: as many in all as with equal shares, or fewer by less than a weight for
    every row of the smallest layer. In a layer whose pattern ranks its rows together they count by ||g_i||. The
    ``batches`` go once through the dense model and back, block by block
    (:func:`pst_ds.prune.output_gradients.layer_norms`). Raises InputError for stacks of experts, for layers that are
    not in the blocks of one stack, for a model that is no language model, and where layers cannot lose as many; and
    FloatingPointError, naming the layer, for what is not finite.
    """
    model.eval()
    movable = require_linear(rules)
    stack, blocks = find_blocks(model, [rule.target.name for rule in movable])
    of_blocks: list[dict[str, nn.Module]] = [{} for _ in blocks]
    for rule in movable:
        of_blocks[block_of(rule.target.name, stack)][rule.target.name] = rule.target.module
    norms = layer_norms(model, blocks, of_blocks, batches, device=device, dtype=dtype)
    histograms = [_histogram(rule, norms[rule.target.name]) for rule in movable]
    sizes = [ranked_together(rule) for rule in movable]
    each = [rule.target.layout.numel // size for rule, size in zip(movable, sizes, strict=True)]
    wanted = sum(prune_count(r.sparsity, size) * n for r, size, n in zip(movable, sizes, each, strict=True))
    try:
        counts = zeros_by_saliency(histograms, wanted, sizes, each)
    except ValueError as error:
        raise InputError(
            f"{error}, since --budgets saliency leaves every layer {LEAST_KEPT} of its weights; lower --sparsity"
        ) from None
    moved = {
        rule.target.name: replace(
            rule, sparsity=share_of(count, size), output_factors=_factors(rule, norms[rule.target.name])
        )
        for rule, count, size in zip(movable, counts, sizes, strict=True)
    }
    return [moved.get(rule.target.name, rule) for rule in rules]


def require_linear(rules: Sequence[LayerRule]) -> list[LayerRule]:
    """Return the rules whose sparsity may change. Raises InputError if there are none, and for stacks of experts."""
    movable = require_movable(rules, "saliency")
    stacked = next((rule.target.name for rule in movable if rule.target.is_stack), None)
    if stacked is not None:
        raise InputError(
            f'budgets = "saliency" needs linear layers, and {stacked} is a stack of experts; choose budgets "owl"'
        )
    return movable


def _factors(rule: LayerRule, norms: LayerNorms) -> Tensor | None:
    """Return the norms of the output gradients, relative to their mean, if the pattern ranks rows together."""
    mean = norms.outputs.mean()
    return None if rule.pattern.kind == "row" or not mean else (norms.outputs / mean).clamp_(min=LEAST_FACTOR)


def _histogram(rule: LayerRule, norms: LayerNorms) -> Tensor:
    weight, layout = rule.target.weight.data, rule.target.layout
    try:
        return score_histogram(saliency_scores(weight, norms.inputs, norms.outputs, transposed=layout.transposed))
    except FloatingPointError as error:
        raise FloatingPointError(f"{rule.target.name}: {error}. See that the model's weights are finite") from None
