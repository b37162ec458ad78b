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
from pst_ds.nn.targets import Target
from pst_ds.parallel.ranks import raise_on_all_ranks
from pst_ds.prune.blocks import BlockSource, Calibration, SourceOf, find_blocks
from pst_ds.prune.output_gradients import LayerNorms, layer_norms
from pst_ds.prune.rules import LayerRule, names_of, rules_by_block
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
    for rule in movable:
        if rule.target.is_stack:
            raise InputError(
                f'budgets = "saliency": {rule.target.name} is a stack of experts, and only linear layers are '
                'supported. Set budgets = "equal"'
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
    if prune_count(share, size) == count:
        return share
    # The division was rounded down, so that the floor of the product is one unit short.
    return math.nextafter(share, 1.0)


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
    stack, blocks = find_blocks(model, names_of(movable))
    by_block = rules_by_block(movable, stack)
    source = source_of(stack, blocks)
    targets: list[dict[str, Target]] = []
    for index in range(len(blocks)):
        targets.append({rule.target.name: rule.target for rule in by_block.get(index, [])})
    norms = layer_norms(model, source, targets, data)
    histograms = _all_histograms(by_block, source, norms, data.ranks)
    histograms_in_order: list[Tensor] = []
    sizes: list[int] = []
    weights_each: list[int] = []
    wanted = 0
    for rule in movable:
        histograms_in_order.append(histograms[rule.target.name])
        size = _ranked_together(rule)
        weights_in_unit = rule.target.layout.numel // size
        sizes.append(size)
        weights_each.append(weights_in_unit)
        # what equal budgets would prune
        wanted += prune_count(rule.sparsity, size) * weights_in_unit
    try:
        counts = zeros_by_saliency(histograms_in_order, wanted, sizes=sizes, weights_each=weights_each)
    except ValueError as error:
        raise InputError(
            f'budgets = "saliency": {error}, because it leaves every layer {LEAST_KEPT} of its weights. Lower the '
            "sparsity"
        ) from None
    moved: dict[str, LayerRule] = {}
    for rule, count, size in zip(movable, counts, sizes, strict=True):
        factors = _factors(rule, norms[rule.target.name])
        moved[rule.target.name] = replace(rule, sparsity=_sparsity_of(count, size), output_factors=factors)
    return [moved.get(rule.target.name, rule) for rule in rules]


def _factors(rule: LayerRule, norms: LayerNorms) -> Tensor | None:
    """Return the norms of the output gradients, relative to their mean, if the pattern ranks rows together."""
    mean = norms.outputs.mean()
    # Without gradients, as of a layer behind a closed gate, rows have no order; the factors would be 0 / 0.
    if rule.pattern.kind == "row" or not mean:
        return None
    # Later steps divide by the factors, so none may be 0.
    return (norms.outputs / mean).clamp_(min=LEAST_FACTOR)


def _all_histograms(
    by_block: Mapping[int, Sequence[LayerRule]], source: BlockSource, norms: Mapping[str, LayerNorms], ranks: Ranks
) -> dict[str, Tensor]:
    """Return the histogram of every layer, (BINS,) int64, by name; ranks read the blocks in turns. Collective."""
    names: list[str] = []
    for rules in by_block.values():
        names += names_of(rules)
    # One sum over ranks for all layers, to which a rank adds 0 for the blocks of others.
    table = torch.zeros(len(names), BINS, dtype=torch.int64)  # (layers, BINS)
    row_of = dict(zip(names, table, strict=True))

    def fill() -> None:
        for index, rules in by_block.items():
            if index % ranks.number != ranks.own:
                continue
            with source.loaded(index):
                for rule in rules:
                    name = rule.target.name
                    row_of[name].copy_(_histogram(rule, norms[name]))

    raise_on_all_ranks(fill, (FloatingPointError,))
    return dict(zip(names, ranks.sums.all_sum(table), strict=True))


def _histogram(rule: LayerRule, norms: LayerNorms) -> Tensor:
    """Return the histogram of a layer's scores, (BINS,) int64. Raises FloatingPointError, naming the layer."""
    weight = rule.target.weight.data
    with naming(rule.target.name):
        scores = saliency_scores(weight, norms.inputs, norms.outputs, transposed=rule.target.layout.transposed)
        return score_histogram(scores)
