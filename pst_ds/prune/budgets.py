"""Sparsity of each layer by the increase of the loss, on calibration data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pst_ds.core.one_shot.budgets import BINS, LEAST_KEPT, saliency_scores, score_histogram, zeros_by_saliency
from pst_ds.core.one_shot.shares import Ranks
from pst_ds.core.select import prune_count
from pst_ds.errors import InputError
from pst_ds.parallel.ranks import raise_on_all_ranks
from pst_ds.prune.blocks import BlockSource, Calibration, SourceOf, find_blocks
from pst_ds.prune.output_gradients import LayerNorms, layer_norms
from pst_ds.prune.rules import LayerRule, rules_by_block
from pst_ds.prune.statistics import naming

LEAST_FACTOR = 1e-3
"""Smallest factor of an output, relative to the mean."""


def require_linear(rules: Sequence[LayerRule]) -> list[LayerRule]:
    """Return the rules whose sparsity may change, at least one. Raises InputError, also for stacks of experts."""
    movable = [rule for rule in rules if rule.pattern.fixed_sparsity is None and not rule.has_own_sparsity]
    if not movable:
        raise InputError(
            f'budgets = "saliency": pattern {rules[0].pattern} has a sparsity of {rules[0].sparsity} in every layer. '
            'Set budgets = "equal", or pattern = "row" or "matrix"'
        )
    stacked = next((rule.target.name for rule in movable if rule.target.is_stack), None)
    if stacked is not None:
        raise InputError(
            f'budgets = "saliency": {stacked} is a stack of experts, and only linear layers are supported. Set '
            'budgets = "equal"'
        )
    return movable


def _ranked_together(rule: LayerRule) -> int:
    """Return how many units of a rule's pattern are ranked together: those of a row, or of a matrix."""
    if rule.pattern.kind == "row":
        return rule.target.layout.in_features
    return rule.target.layout.matrix_numel // (rule.pattern.outputs * rule.pattern.inputs)


def _sparsity_of(count: int, size: int) -> float:
    """Return the sparsity that prunes ``count`` of ``size`` units."""
    share = count / size
    return share if prune_count(share, size) == count else math.nextafter(share, 1.0)


def rules_by_saliency(
    model: nn.Module, rules: Sequence[LayerRule], data: Calibration, *, source_of: SourceOf = BlockSource
) -> list[LayerRule]:
    """Return the ``rules`` with a sparsity per layer; the model is unchanged.

    All weights of the movable layers are ranked together by |W_ij| ||x_j|| ||g_i||. Each layer loses its weights among
    the smallest: together as many as before, or fewer by less than one weight per row of the smallest layer. Where a
    pattern ranks rows together, they are weighed by ||g_i||. The ``data`` pass once through the dense model and
    back, block by block (:func:`pst_ds.prune.output_gradients.layer_norms`).

    Raises InputError for stacks of experts, for layers that are not in the blocks of one stack, for a model without
    token logits, and if the layers cannot lose that many weights; and FloatingPointError, naming the layer, for values
    that are not finite.
    """
    model.eval()
    movable = require_linear(rules)
    stack, blocks = find_blocks(model, [rule.target.name for rule in movable])
    by_block = rules_by_block(movable, stack)
    source = source_of(stack, blocks)
    targets = [{rule.target.name: rule.target for rule in by_block.get(i, [])} for i in range(len(blocks))]
    norms = layer_norms(model, source, targets, data)
    own = raise_on_all_ranks(lambda: _histograms(by_block, source, norms, data.ranks), (FloatingPointError,))
    counted = data.ranks.sums.all_sum(own)
    found = dict(zip((r.target.name for of_block in by_block.values() for r in of_block), counted, strict=True))
    histograms = [found[rule.target.name] for rule in movable]
    sizes = [_ranked_together(rule) for rule in movable]
    each = [rule.target.layout.numel // size for rule, size in zip(movable, sizes, strict=True)]
    wanted = sum(prune_count(r.sparsity, size) * n for r, size, n in zip(movable, sizes, each, strict=True))
    try:
        counts = zeros_by_saliency(histograms, wanted, sizes, each)
    except ValueError as error:
        raise InputError(
            f'budgets = "saliency": {error}, because it leaves every layer {LEAST_KEPT} of its weights. Lower the '
            "sparsity"
        ) from None
    moved = {
        rule.target.name: replace(
            rule, sparsity=_sparsity_of(count, size), output_factors=_factors(rule, norms[rule.target.name])
        )
        for rule, count, size in zip(movable, counts, sizes, strict=True)
    }
    return [moved.get(rule.target.name, rule) for rule in rules]


def _factors(rule: LayerRule, norms: LayerNorms) -> Tensor | None:
    """Return the norms of the output gradients, relative to their mean, if the pattern ranks rows together."""
    mean = norms.outputs.mean()
    return None if rule.pattern.kind == "row" or not mean else (norms.outputs / mean).clamp_(min=LEAST_FACTOR)


def _histograms(
    by_block: Mapping[int, Sequence[LayerRule]], source: BlockSource, norms: Mapping[str, LayerNorms], ranks: Ranks
) -> Tensor:
    """Return the histograms of the layers in the blocks of this rank, (layers, BINS); 0 for the others."""
    found = torch.zeros(sum(map(len, by_block.values())), BINS, dtype=torch.int64)
    rows = iter(found)
    for index, rules in by_block.items():
        own = [(rule, next(rows)) for rule in rules]
        if index % ranks.number == ranks.own:
            with source.loaded(index):
                for rule, row in own:
                    row.copy_(_histogram(rule, norms[rule.target.name]))
    return found


def _histogram(rule: LayerRule, norms: LayerNorms) -> Tensor:
    weight, layout = rule.target.weight.data, rule.target.layout
    with naming(rule.target.name):
        return score_histogram(saliency_scores(weight, norms.inputs, norms.outputs, transposed=layout.transposed))
