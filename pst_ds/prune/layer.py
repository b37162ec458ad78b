"""Prune one layer by its rule and the statistics of its inputs; a stack of experts expert by expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pst_ds.core.bits import apply_mask_
from pst_ds.core.layout import WeightLayout
from pst_ds.core.one_shot.alps import InputSpectrum, alps, input_spectrum
from pst_ds.core.one_shot.gram import UnitGram, unit_gram
from pst_ds.core.one_shot.scored import Compensated, keep_by_score, wanda_scores
from pst_ds.core.one_shot.sparsegpt import InverseFactor, inverse_factor, round_under_mask, sparsegpt
from pst_ds.core.one_shot.swaps import refine_by_swaps
from pst_ds.prune.rules import LayerRule, Method


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """The outcome for one layer."""

    name: str
    shape: tuple[int, int]
    """(O, I); (E*O, I) of a stack of experts."""
    matrices: int
    """Fused matrices, each pruned separately."""
    pattern: str
    sparsity_requested: float
    pruned: int
    """Weights that the mask prunes."""
    zeros: int
    """Zeros in the weight, including kept weights that are zero."""
    dtype: str = ""
    expert_zeros: tuple[int, ...] = ()
    """Zeros of each expert of a stack; empty for a linear layer."""
    expert_tokens: tuple[int, ...] = ()
    """Calibration tokens of each expert of a stack; empty without calibration data."""
    scales: Tensor | None = field(default=None, repr=False, compare=False)
    """(O, groups) bf16, on the CPU, of a quantised weight."""


class LayerPruning:
    """A layer that is pruned, in place, expert by expert; a linear layer is one expert.

    Create it while the target's weight is the stored one. If the target computes with a copy of it later, as on
    another device, the copy is pruned too.
    """

    def __init__(self, rule: LayerRule):
        self.rule = rule
        self.weight = rule.target.weight.data
        layout = rule.target.layout
        self._of_expert = replace(rule, target=replace(rule.target, layout=layout.expert))
        self._kept = 0
        self._scales: list[Tensor] = []

    @property
    def name(self) -> str:
        return self.rule.target.name

    def prune(self, given: Inputs, expert: int = 0) -> None:
        """Prune an ``expert`` on its inputs, in order of the experts. Raises FloatingPointError."""
        height = self.rule.target.layout.expert.shape[0]
        rows = slice(expert * height, (expert + 1) * height)
        stored, computing = (whole.flatten(0, -2)[rows] for whole in (self.weight, self.rule.target.weight.data))
        with self.naming(expert):
            made = prune_weight(stored, self._of_expert, given)
        stored.copy_(made.weight)
        computing.copy_(made.weight)
        self._kept += int(made.keep.sum())
        self._scales += [] if made.scales is None else [made.scales.cpu()]

    def outcome(self, expert_tokens: Sequence[int] = ()) -> PrunedLayer:
        """Return the outcome, after all experts were pruned."""
        rule, layout = self.rule, self.rule.target.layout
        pruned, experts = layout.numel - self._kept, self.weight if rule.target.is_stack else ()
        return PrunedLayer(
            name=self.name,
            shape=(layout.out_features, layout.in_features),
            matrices=layout.num_matrices,
            pattern="zeros" if rule.keeps_zeros else str(rule.pattern),
            sparsity_requested=pruned / layout.numel if rule.keeps_zeros else rule.sparsity,
            pruned=pruned,
            zeros=layout.numel - int(torch.count_nonzero(self.weight)),
            dtype=str(self.weight.dtype).removeprefix("torch."),
            expert_zeros=tuple(one.numel() - int(torch.count_nonzero(one)) for one in experts),
            expert_tokens=tuple(expert_tokens),
            scales=torch.cat(self._scales) if self._scales else None,
        )

    @contextmanager
    def naming(self, expert: int = 0) -> Iterator[None]:
        """Add the layer, the expert and advice to a FloatingPointError."""
        try:
            yield
        except FloatingPointError as error:
            which = f"{self.name}, expert {expert}" if self.rule.target.is_stack else self.name
            raise FloatingPointError(
                f"{which}: {error}. Check that the model's weights are finite, and calibrate with "
                "--set train.precision=fp32"
            ) from None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Statistics of a layer's inputs; all None to prune by magnitude."""

    norms: Tensor | None = None
    """(I,), for Wanda."""
    factor: InverseFactor | None = None
    """For SparseGPT."""
    spectrum: InputSpectrum | None = None
    """For ALPS."""
    gram: UnitGram | None = None
    """For swaps, after any method."""

    @property
    def changes_weights(self) -> bool:
        """Return whether the method changes the kept weights."""
        return self.factor is not None or self.spectrum is not None


def inputs_of(method: Method, total: Tensor, *, swaps: bool = False) -> Inputs:
    """Return a method's statistics from a sum over all tokens: of products, (I, I), or of squares, (I,).

    Squares are for Wanda and magnitude without ``swaps``. Raises FloatingPointError.
    """
    if method == "alps":
        spectrum = input_spectrum(total)
        return Inputs(spectrum=spectrum, gram=spectrum if swaps else None)
    gram = unit_gram(total) if swaps else None
    if method == "sparsegpt":
        return Inputs(factor=inverse_factor(total), gram=gram)
    if method == "wanda":
        return Inputs(norms=(total.diagonal() if swaps else total).sqrt(), gram=gram)
    return Inputs(gram=gram)


def equal_inputs(method: Method, number: int, device: torch.device) -> Inputs:
    """Return statistics for a layer without inputs, which rank its weights by magnitude."""
    if method != "sparsegpt":
        return Inputs()
    none_dead = torch.zeros(number, dtype=torch.bool, device=device)
    return Inputs(factor=InverseFactor(torch.eye(number, device=device), none_dead))


def prune_weight(weight: Tensor, rule: LayerRule, given: Inputs) -> Compensated:
    """Return the pruned weight, in the dtype and storage order of ``weight``, and its mask: new tensors.

    ``given``: statistics of the layer's inputs, on whose device the result is. Rows are ranked as if each were
    multiplied by its ``rule.output_factors``. Scales, if the rule has a grid, are (O, groups). Raises
    FloatingPointError for values that are not finite.
    """
    if rule.output_factors is None:
        return _pruned(weight, rule, given)
    factors = rule.output_factors.to(weight.device)
    factors = factors if rule.target.layout.transposed else factors.unsqueeze(1)
    made = _pruned(weight.to(torch.float32) * factors, rule, given)
    if given.changes_weights:
        return replace(made, weight=made.weight / factors.to(made.weight.device))
    own = weight.to(made.keep.device, memory_format=torch.contiguous_format, copy=True)
    return replace(made, weight=apply_mask_(own, made.keep))


def _pruned(weight: Tensor, rule: LayerRule, given: Inputs) -> Compensated:
    layout, of_products = rule.target.layout, given.gram or given.factor or given.spectrum
    if of_products is None:
        return _scored(weight, layout, rule, given.norms)
    weight = weight.to(of_products.dead.device)
    pruned = torch.empty_like(weight, memory_format=torch.contiguous_format)
    keep = torch.empty(layout.shape, dtype=torch.uint8, device=weight.device)
    scales = []
    for matrix in layout.matrices():
        at = matrix.rect.slices
        made = _pruned_matrix(weight[at].t() if layout.transposed else weight[at], rule, given)
        pruned[at] = made.weight.t() if layout.transposed else made.weight
        keep[at] = made.keep.t() if layout.transposed else made.keep
        if made.scales is not None:
            scales.append(made.scales)
    return Compensated(pruned, keep, torch.cat(scales) if scales else None)


def _scored(weight: Tensor, layout: WeightLayout, rule: LayerRule, norms: Tensor | None) -> Compensated:
    """Keep the weights of largest magnitude, times the ``norms`` of their inputs if these are known."""
    if norms is None:
        scores = weight.to(torch.float32).abs()
    else:
        weight = weight.to(norms.device)
        scores = wanda_scores(weight, norms, transposed=layout.transposed)
    keep = keep_by_score(scores, layout, rule.pattern, rule.sparsity)
    return Compensated(apply_mask_(weight.clone(memory_format=torch.contiguous_format), keep), keep)


def _pruned_matrix(weight: Tensor, rule: LayerRule, given: Inputs) -> Compensated:
    """Prune and quantise one matrix (O, I), then refine its mask by swaps."""
    if given.spectrum is not None:
        made = alps(weight, given.spectrum, rule.pattern, rule.sparsity)
    elif given.factor is None:
        made = _scored(weight, WeightLayout(*weight.shape), rule, given.norms)
    elif rule.keeps_zeros:
        assert rule.grid is not None, "nothing to do"
        made = round_under_mask(weight, weight != 0, given.factor, rule.grid, dtype=weight.dtype)
    else:
        made = sparsegpt(weight, given.factor, rule.pattern, rule.sparsity, grid=rule.grid, dtype=weight.dtype)
    if given.gram is None:
        return made
    return refine_by_swaps(weight, made, given.gram, rule.pattern, rule.swaps, refit=given.changes_weights)
