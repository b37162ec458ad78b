"""Sparsity of each block by the share of outliers among its weights (OWL), on calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pst_ds.core.one_shot import outlier_share, wanda_scores, zeros_by_outliers
from pst_ds.core.select import prune_count
from pst_ds.errors import InputError
from pst_ds.nn import experts
from pst_ds.nn.input_sums import InputGatherer, InputSum, squares
from pst_ds.progress import Progress
from pst_ds.prune.blocks import block_of, find_blocks
from pst_ds.prune.model import without_cache
from pst_ds.prune.replay import Batch, BlockReplay
from pst_ds.prune.rules import LayerRule


def require_movable(rules: Sequence[LayerRule], budgets: str) -> list[LayerRule]:
    """Return the ``rules`` whose sparsity ``budgets`` may change. Raises InputError if there are none."""
    movable = [rule for rule in rules if is_movable(rule)]
    if not movable:
        raise InputError(
            f"--budgets {budgets} moves zeros from layer to layer, and pattern {rules[0].pattern} has "
            f"{rules[0].sparsity} of them in every one; leave --budgets out, or choose --pattern row or matrix"
        )
    return movable


def require_room(rules: Sequence[LayerRule], spread: float) -> None:
    """Raise InputError unless every sparsity can change by ``spread`` in both directions."""
    for rule in require_movable(rules, "owl"):
        room = min(rule.sparsity, 1.0 - rule.sparsity)
        if not 0.0 < spread <= room:
            raise InputError(
                f"--spread {spread} is how far a block's share of zeros may be from {rule.sparsity}; choose a number "
                f"above 0, and at most {room:.6g}"
            )


def rules_by_outliers(
    model: nn.Module,
    rules: Sequence[LayerRule],
    batches: Sequence[Batch],
    *,
    device: torch.device,
    dtype: torch.dtype,
    spread: float,
) -> tuple[list[LayerRule], list[float]]:
    """Return the ``rules`` with the sparsity of their blocks, and the share of outliers of each block.

    One pass of the ``batches`` through the dense model, block by block on ``device`` and in ``dtype``. Layers of one
    shape, pattern and share together lose as many weights as before. Layers with N:M, or a share of their own, keep it.
    Raises InputError for layers that are not in the blocks of one stack, and FloatingPointError, naming the block, for
    what is not finite.
    """
    model.eval()
    stack, blocks = find_blocks(model, [rule.target.name for rule in rules])
    by_block: dict[int, list[LayerRule]] = {}
    for rule in rules:
        by_block.setdefault(block_of(rule.target.name, stack), []).append(rule)
    outliers, last = dict[int, float](), max(by_block)
    with (
        without_cache(model),
        BlockReplay(model, blocks, batches, device, dtype) as replay,
        Progress("budgets", last + 1, "blocks") as shown,
    ):
        for index in range(last + 1):
            of_block = by_block.get(index, [])
            with replay.resident(index):
                scores = _scores(replay, index, of_block)
                if of_block:
                    outliers[index] = _outlier_share(scores, f"{stack}.{index}")
            shown.add(1, f"{stack}.{index}")
    of_rules = [outliers[block_of(rule.target.name, stack)] for rule in rules]
    return _with_budgets(rules, of_rules, spread), list(outliers.values())


def _outlier_share(scores: Callable[[], Iterator[Tensor]], block: str) -> float:
    try:
        return outlier_share(scores)
    except FloatingPointError as error:
        raise FloatingPointError(f"{block}: {error}. See that the model's weights are finite") from None


def _scores(replay: BlockReplay, index: int, rules: Sequence[LayerRule]) -> Callable[[], Iterator[Tensor]]:
    """Run block ``index``; return what yields the scores of its layers' weights, each expert's by its own tokens."""
    gatherer = InputGatherer(squares)
    linear = {rule.target.name: rule.target.module for rule in rules if not rule.target.is_stack}
    stacks = {(r.target.module, r.target.parameter): r.target.name for r in rules if r.target.is_stack}
    with gatherer.listening(linear), experts.listening(stacks, gatherer.add_experts):
        replay.run(index, keep_output=True, before=gatherer.begin)

    def scores() -> Iterator[Tensor]:
        for rule in rules:
            yield from _layer_scores(rule, gatherer.sums.get(rule.target.name))

    return scores


def _layer_scores(rule: LayerRule, sums: InputSum | None) -> Iterator[Tensor]:
    """Yield the scores of a layer's weights, expert by expert; 0 for experts without a token."""
    layout, weight = rule.target.layout, rule.target.weight.data.flatten(0, -2)
    height = layout.expert.shape[0]
    for expert in range(layout.num_experts):
        own = weight[expert * height : (expert + 1) * height]
        if sums is None or sums.total is None:
            yield torch.zeros_like(own, dtype=torch.float32)
            continue
        total = sums.total[expert] if rule.target.is_stack else sums.total
        yield wanda_scores(own, total.sqrt(), transposed=layout.transposed)


def is_movable(rule: LayerRule) -> bool:
    """Return whether a budget may change the layer's sparsity."""
    return rule.pattern.fixed_sparsity is None and not rule.has_own_sparsity


def _with_budgets(rules: Sequence[LayerRule], outliers: Sequence[float], spread: float) -> list[LayerRule]:
    """Return the rules with sparsity by the ``outliers`` of their blocks; equal shapes and patterns share a budget."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, rule in enumerate(rules):
        if is_movable(rule):
            alike.setdefault((rule.target.layout, rule.pattern, rule.sparsity), []).append(i)
    found = list(rules)
    for members in alike.values():
        first = rules[members[0]]
        size = ranked_together(first)
        count = prune_count(first.sparsity, size)
        counts = zeros_by_outliers([outliers[i] for i in members], count, size, spread)
        for i, zeros in zip(members, counts, strict=True):
            found[i] = replace(rules[i], sparsity=share_of(zeros, size))
    return found


def ranked_together(rule: LayerRule) -> int:
    """Return how many units of a rule's pattern are ranked together: those of a row, or of a matrix."""
    if rule.pattern.kind == "row":
        return rule.target.layout.in_features
    return rule.target.layout.matrix_numel // (rule.pattern.outputs * rule.pattern.inputs)


def share_of(count: int, size: int) -> float:
    """Return the sparsity that prunes ``count`` of ``size`` units."""
    share = count / size
    return share if prune_count(share, size) == count else math.nextafter(share, 1.0)
