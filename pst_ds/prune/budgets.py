"""Sparsity of each block by outliers (OWL), or of each layer by the increase of the loss, on calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from pst_ds.core.one_shot.budgets import (
    BINS,
    LEAST_KEPT,
    outlier_share,
    saliency_scores,
    score_histogram,
    zeros_by_outliers,
    zeros_by_saliency,
)
from pst_ds.core.one_shot.scored import wanda_scores
from pst_ds.core.one_shot.shares import Ranks
from pst_ds.core.select import prune_count
from pst_ds.errors import InputError
from pst_ds.nn.input_sums import InputGatherer, InputSum, squares
from pst_ds.parallel.ranks import raise_on_all_ranks
from pst_ds.progress import Progress
from pst_ds.prune.blocks import BlockReplay, BlockSource, Calibration, SourceOf, block_of, find_blocks
from pst_ds.prune.output_gradients import LayerNorms, layer_norms
from pst_ds.prune.rules import LayerRule, rules_by_block
from pst_ds.prune.statistics import gather, naming

LEAST_FACTOR = 1e-3
"""Smallest factor of an output, relative to the mean."""


def require_movable(rules: Sequence[LayerRule], budgets: str) -> list[LayerRule]:
    """Return the ``rules`` whose sparsity ``budgets`` may change, at least one. Raises InputError."""
    movable = [rule for rule in rules if _is_movable(rule)]
    if not movable:
        raise InputError(
            f"--budgets {budgets}: pattern {rules[0].pattern} has a sparsity of {rules[0].sparsity} in every layer. "
            "Remove --budgets, or choose --pattern row or matrix"
        )
    return movable


def require_room(rules: Sequence[LayerRule], spread: float) -> None:
    """Raise InputError unless every sparsity can change by ``spread`` in both directions."""
    for rule in require_movable(rules, "owl"):
        room = min(rule.sparsity, 1.0 - rule.sparsity)
        if not 0.0 < spread <= room:
            raise InputError(
                f"--spread {spread}: a block's sparsity cannot be that far from {rule.sparsity}. Choose a number above "
                f"0, and at most {room:.6g}"
            )


def require_linear(rules: Sequence[LayerRule]) -> list[LayerRule]:
    """Return the rules whose sparsity may change, at least one. Raises InputError, also for stacks of experts."""
    movable = require_movable(rules, "saliency")
    stacked = next((rule.target.name for rule in movable if rule.target.is_stack), None)
    if stacked is not None:
        raise InputError(
            f'budgets = "saliency": {stacked} is a stack of experts, and only linear layers are supported. Choose '
            'budgets = "owl"'
        )
    return movable


def _is_movable(rule: LayerRule) -> bool:
    return rule.pattern.fixed_sparsity is None and not rule.has_own_sparsity


def rules_by_outliers(
    model: nn.Module, rules: Sequence[LayerRule], data: Calibration, *, spread: float, source_of: SourceOf = BlockSource
) -> tuple[list[LayerRule], list[float]]:
    """Return the ``rules`` with the sparsity of their blocks, and the fraction of outliers of each block.

    One pass of the ``data`` through the dense model, block by block. Layers of equal shape, pattern and sparsity
    together lose as many weights as before. N:M layers and layers with an override keep their sparsity. Raises
    InputError for layers outside the blocks of one stack, and FloatingPointError, naming the block, for values that
    are not finite. Collective.
    """
    model.eval()
    stack, blocks = find_blocks(model, [rule.target.name for rule in rules])
    by_block = rules_by_block(rules, stack)
    outliers, last = dict[int, float](), max(by_block)
    replay = BlockReplay(model, source_of(stack, blocks), data)
    with replay.in_place(), Progress("budgets", last + 1, "blocks") as shown:
        for index in range(last + 1):
            with replay.resident(index):
                scores = _scores(replay, index, by_block.get(index, []))
                if index in by_block:
                    with naming(f"{stack}.{index}"):
                        outliers[index] = outlier_share(scores)
            shown.add(1, f"{stack}.{index}")
    of_rules = [outliers[block_of(rule.target.name, stack)] for rule in rules]
    return _with_budgets(rules, of_rules, spread), list(outliers.values())


def _scores(replay: BlockReplay, index: int, rules: Sequence[LayerRule]) -> Callable[[], Iterator[Tensor]]:
    """Run block ``index``; return what yields the scores of its layers' weights, each expert's by its own tokens."""
    linear, stacks = ([r.target for r in rules if r.target.is_stack is kind] for kind in (False, True))
    of_linear, of_stacks = InputGatherer(squares), InputGatherer(squares)
    gather(replay, index, [(of_linear, linear)], [(of_stacks, stacks)], keep_output=True)
    sums = of_linear.sums | of_stacks.sums
    return lambda: chain.from_iterable(_layer_scores(rule, sums.get(rule.target.name)) for rule in rules)


def _layer_scores(rule: LayerRule, sums: InputSum | None) -> Iterator[Tensor]:
    """Yield the scores of a layer's weights, expert by expert; 0 for experts without a token."""
    layout, weight = rule.target.layout, rule.target.weight.data.flatten(0, -2)
    for expert, own in enumerate(weight.split(layout.expert.shape[0])):
        total = None if sums is None else sums.of.get(expert)
        if total is None:
            yield torch.zeros_like(own, dtype=torch.float32)
        else:
            yield wanda_scores(own, total.whole().sqrt(), transposed=layout.transposed)


def _with_budgets(rules: Sequence[LayerRule], outliers: Sequence[float], spread: float) -> list[LayerRule]:
    """Return the rules with sparsity by the ``outliers`` of their blocks; equal shapes and patterns share a budget."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, rule in enumerate(rules):
        if _is_movable(rule):
            alike.setdefault((rule.target.layout, rule.pattern, rule.sparsity), []).append(i)
    found = list(rules)
    for members in alike.values():
        size = _ranked_together(rules[members[0]])
        count = prune_count(rules[members[0]].sparsity, size)
        counts = zeros_by_outliers([outliers[i] for i in members], count, size, spread)
        for i, pruned in zip(members, counts, strict=True):
            found[i] = replace(rules[i], sparsity=_sparsity_of(pruned, size))
    return found


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
            f"--budgets saliency: {error}, because it leaves every layer {LEAST_KEPT} of its weights. Lower --sparsity"
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
