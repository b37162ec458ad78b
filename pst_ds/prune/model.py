"""A whole model pruned once, block after block: each layer by its rule, on what the pruned blocks before it give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.core.bits import apply_mask_
from pst_ds.core.one_shot import (
    Compensated,
    InverseFactor,
    inverse_factor,
    keep_by_score,
    round_under_mask,
    sparsegpt,
    wanda_scores,
)
from pst_ds.errors import InputError
from pst_ds.nn.input_sums import InputGatherer, products, squares
from pst_ds.progress import Progress
from pst_ds.prune.blocks import block_of, find_blocks
from pst_ds.prune.replay import Batch, BlockReplay
from pst_ds.prune.rules import LayerRule, Method


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """The outcome for one layer."""

    name: str
    shape: tuple[int, int]
    """(O, I); (E*O, I) of a stack of experts."""
    matrices: int
    """Fused in it, each pruned by itself."""
    pattern: str
    sparsity_requested: float
    pruned: int
    """Weights that the mask prunes."""
    zeros: int
    """Counted in the weight, so with kept weights that are zero."""
    scales: Tensor | None = field(default=None, repr=False, compare=False)
    """(O, groups) bf16, on the CPU, of a weight that was rounded to a grid."""


def prune_model(
    model: nn.Module,
    rules: Sequence[LayerRule],
    method: Method,
    batches: Sequence[Batch],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> list[PrunedLayer]:
    """Prune a whole ``model`` on the CPU in place; what was done to each layer, in the order of ``rules``.

    "magnitude" needs no ``batches``. The others run every block twice on them, on ``device`` and in ``dtype``: once to
    gather what its layers are given, once, pruned, for its output. A batch has the model's arguments; where it has an
    ``attention_mask`` (batch, length), the positions with 0 count for nothing. The device holds one block, a batch, and
    the statistics of one block; the CPU the model and the hidden states of all batches. Kept weights keep their bits
    with "magnitude" and "wanda"; pruned ones are +0.0. Raises InputError, and FloatingPointError, naming the layer, for
    inputs that are not finite. Says on stderr how far it is.
    """
    model.eval()
    if method == "magnitude":
        return [_prune(rule, rule.target.weight.data, None) for rule in rules]
    stack, blocks = find_blocks(model, [rule.target for rule in rules])
    by_block: dict[int, list[LayerRule]] = {}
    for rule in rules:
        by_block.setdefault(block_of(rule.target, stack), []).append(rule)
    done: dict[str, PrunedLayer] = {}
    last = max(by_block)
    with (
        _without_cache(model),
        BlockReplay(model, blocks, batches, device, dtype) as replay,
        Progress("prune", last + 1, "blocks") as shown,
    ):
        for index in range(last + 1):
            for layer in _prune_block(replay, index, by_block.get(index, []), method, goes_on=index < last):
                done[layer.name] = layer
            shown.add(1, f"{stack}.{index}")
    return [done[rule.target.name] for rule in rules]


def _prune_block(
    replay: BlockReplay, index: int, rules: Sequence[LayerRule], method: Method, *, goes_on: bool
) -> list[PrunedLayer]:
    """Gather, prune and, if the pass ``goes_on``, run the block again for what the next one is given."""
    weights = [rule.target.weight.data for rule in rules]  # as the model has them, not as the device does
    gatherer = InputGatherer(squares if method == "wanda" else products)
    factors = _Factors()
    layers = []
    with replay.resident(index):
        if rules:
            with gatherer.listening({rule.target.name: rule.target.module for rule in rules}):
                replay.run(index, keep_output=False, before=gatherer.begin)
        for rule, weight in zip(rules, weights, strict=True):
            with _naming(rule):
                total = _total(gatherer, rule.target.name)
                given = total.sqrt() if method == "wanda" else factors.of(total)
            layers.append(_prune(rule, weight, given))
        if goes_on:
            replay.run(index, keep_output=True)
    return layers


def _total(gatherer: InputGatherer, name: str) -> Tensor:
    found = gatherer.sums.get(name)
    if found is None or found.total is None or not found.num_tokens:
        raise InputError(
            f"{name} was given nothing by the calibration text; use more --samples, or leave it dense with "
            "pst.exclude_modules"
        )
    return found.total


class _Factors:
    """Inverse factors of Gram matrices; of equal ones that follow each other, as q, k and v have them, one."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, InverseFactor] | None = None

    def of(self, gram: Tensor) -> InverseFactor:
        """Return the inverse factor of ``gram``. Raises FloatingPointError."""
        if self._last is None or not torch.equal(self._last[0], gram):
            self._last = gram, inverse_factor(gram)
        return self._last[1]


def _prune(rule: LayerRule, weight: Tensor, given: Tensor | InverseFactor | None) -> PrunedLayer:
    """Prune ``weight``, the layer's own, in place, and what the layer computes with if that is a copy of it.

    A stack of experts is pruned an expert at a time, each with what is ``given``.
    """
    layout, scales, kept = rule.target.layout, list[Tensor](), 0
    one = replace(rule, target=replace(rule.target, layout=layout.expert))
    stored, computing = weight.flatten(0, -2), rule.target.weight.data.flatten(0, -2)
    for first in range(0, layout.shape[0], layout.expert.shape[0]):
        rows = slice(first, first + layout.expert.shape[0])
        with _naming(rule):
            made = prune_weight(stored[rows], one, given)
        stored[rows].copy_(made.weight)
        computing[rows].copy_(made.weight)
        kept += int(made.keep.sum())
        scales += [] if made.scales is None else [made.scales.cpu()]
    pruned = layout.numel - kept
    return PrunedLayer(
        name=rule.target.name,
        shape=(layout.out_features, layout.in_features),
        matrices=layout.num_matrices,
        pattern="zeros" if rule.keeps_zeros else str(rule.pattern),
        sparsity_requested=pruned / layout.numel if rule.keeps_zeros else rule.sparsity,
        pruned=pruned,
        zeros=layout.numel - int(torch.count_nonzero(weight)),
        scales=torch.cat(scales) if scales else None,
    )


def prune_weight(weight: Tensor, rule: LayerRule, given: Tensor | InverseFactor | None) -> Compensated:
    """Return the pruned weight, in the dtype of ``weight``, and its mask: new tensors, as ``weight`` is stored.

    Scales, if the rule has a grid, are (O, groups) however the weight is stored.

    ``given``: norms of the layer's inputs, (I,), for Wanda; their inverse factor for SparseGPT; None for magnitude. The
    result is on its device. Raises FloatingPointError for values that are not finite.
    """
    layout = rule.target.layout
    if isinstance(given, InverseFactor):
        return _sparsegpt(weight.to(given.upper.device), rule, given)
    if given is None:
        scores = weight.to(torch.float32).abs()
    else:
        weight = weight.to(given.device)
        scores = wanda_scores(weight, given, transposed=layout.transposed)
    keep = keep_by_score(scores, layout, rule.pattern, rule.sparsity)
    return Compensated(apply_mask_(weight.clone(memory_format=torch.contiguous_format), keep), keep)


def _sparsegpt(weight: Tensor, rule: LayerRule, factor: InverseFactor) -> Compensated:
    layout = rule.target.layout
    pruned = torch.empty_like(weight, memory_format=torch.contiguous_format)
    keep = torch.empty(layout.shape, dtype=torch.uint8, device=weight.device)
    scales = []
    for matrix in layout.matrices():
        at = slice(matrix.rect.r0, matrix.rect.r1), slice(matrix.rect.c0, matrix.rect.c1)
        oriented = weight[at].t() if layout.transposed else weight[at]
        made = _compensated(oriented, rule, factor)
        pruned[at] = made.weight.t() if layout.transposed else made.weight
        keep[at] = made.keep.t() if layout.transposed else made.keep
        if made.scales is not None:
            scales.append(made.scales)
    return Compensated(pruned, keep, torch.cat(scales) if scales else None)


def _compensated(weight: Tensor, rule: LayerRule, factor: InverseFactor) -> Compensated:
    """Prune and round one matrix (O, I)."""
    if not rule.keeps_zeros:
        return sparsegpt(weight, factor, rule.pattern, rule.sparsity, grid=rule.grid, dtype=weight.dtype)
    assert rule.grid is not None, "nothing to do"
    return round_under_mask(weight, weight != 0, factor, rule.grid, dtype=weight.dtype)


@contextmanager
def _naming(rule: LayerRule) -> Iterator[None]:
    """A FloatingPointError says of which layer it is, and what may help."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{rule.target.name}: {error}. See that the model's weights are finite, and calibrate with --set "
            "train.precision=fp32"
        ) from None


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No keys and values are kept for generation; the config is as it was afterwards."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not hasattr(config, "use_cache"):
        yield
        return
    before, config.use_cache = config.use_cache, False
    try:
        yield
    finally:
        config.use_cache = before
