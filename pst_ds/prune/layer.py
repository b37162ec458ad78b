"""Prune one layer by its rule and the statistics of its inputs; a stack of experts expert by expert."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pst_ds.core.bits import apply_mask_
from pst_ds.core.one_shot.alps import alps_of_shares
from pst_ds.core.one_shot.gram import UnitGram, unit_gram
from pst_ds.core.one_shot.scored import Compensated, joined, wanda_scores
from pst_ds.core.one_shot.shares import ALONE, Ranks, Share, keep_by_scores
from pst_ds.core.one_shot.sparsegpt import InverseFactor, inverse_factor, round_under_mask, sparsegpt_of_share
from pst_ds.core.quantization import SCALE_DTYPE
from pst_ds.prune.outcome import PrunedLayer
from pst_ds.prune.rules import LayerRule, Method
from pst_ds.prune.statistics import naming


class LayerPruning:
    """A layer that is pruned, in place, matrix by matrix; a linear layer is one expert.

    Create it while the target's weight is the stored one. If the target computes with a copy of it, as on another
    device, :meth:`exchange` updates the copy.
    """

    def __init__(self, rule: LayerRule, ranks: Ranks):
        """``ranks``: share the rows of a linear layer, and the experts of a stack."""
        self.rule, self._ranks = rule, ranks
        self.weight = rule.target.weight.data
        self._kept = 0
        self._scales: dict[tuple[int, int], Tensor] = {}
        self.name, self.num_experts = rule.target.name, rule.target.layout.num_experts
        self.num_matrices = rule.target.layout.expert.num_matrices
        """Fused matrices of an expert."""

    def matrix(self, expert: int, number: int) -> Tensor:
        """Return a matrix of the stored weight as a view, (O, I)."""
        layout = self.rule.target.layout.expert
        height = layout.shape[0]
        rows = self.weight.flatten(0, -2)[expert * height : (expert + 1) * height]
        part = rows[list(layout.matrices())[number].rect.slices]
        return part.t() if layout.transposed else part

    def require_finite(self) -> None:
        """Raise FloatingPointError, on all ranks, for weights that are not finite."""
        with self.naming():
            if not bool(torch.isfinite(self.weight).all()):
                raise FloatingPointError("weights are not finite")

    def ranks_of(self, expert: int) -> Ranks | None:
        """Return the ranks that share an expert's rows; None if another rank prunes this expert of a stack."""
        if not self.rule.target.is_stack:
            return self._ranks
        return ALONE if expert % self._ranks.number == self._ranks.own else None

    def take(self, expert: int, number: int, rows: slice, made: Compensated) -> None:
        """Write the outcome for ``rows`` of a matrix into the stored weight."""
        self.matrix(expert, number)[rows] = made.weight.to(self.weight.device, self.weight.dtype)
        self._kept += int(made.keep.sum())
        if made.scales is not None:
            height = len(self.matrix(expert, number))
            scales = made.scales.new_zeros(height, made.scales.shape[1])
            scales[rows] = made.scales
            self._scales[expert, number] = scales.cpu()

    def exchange(self) -> None:
        """Give every rank the rows of all others. Collective. Raises FloatingPointError, on all."""
        weight, target = self.weight, self.rule.target.weight.data
        if self._ranks.number > 1:
            self._exchange_rows()
        if not bool(torch.isfinite(weight).all()):
            with self.naming():
                raise FloatingPointError("the pruned weights are not finite")
        if target.data_ptr() != weight.data_ptr():
            target.copy_(weight)

    def _exchange_rows(self) -> None:
        ranks, every = self._ranks, [(e, n) for e in range(self.num_experts) for n in range(self.num_matrices)]
        device = self.rule.target.weight.device
        self._kept = int(ranks.sums.all_sum(torch.tensor(self._kept)))
        grid, inputs = self.rule.grid, self.rule.target.layout.in_features
        groups = grid.num_groups(inputs) if grid is not None else 0
        for expert, number in every:
            matrix = self.matrix(expert, number)
            scales = self._scales.setdefault((expert, number), torch.zeros(len(matrix), groups, dtype=SCALE_DTYPE))
            for source in range(ranks.number):
                rows = self._rows_of(source, expert, matrix)
                if rows.start == rows.stop:
                    continue
                matrix[rows] = ranks.broadcast(matrix[rows].contiguous().to(device), source).to(matrix.device)
                if grid is not None:
                    scales[rows] = ranks.broadcast(scales[rows].to(device), source).cpu()
        if grid is None:
            self._scales.clear()

    def _rows_of(self, rank: int, expert: int, matrix: Tensor) -> slice:
        """Return the rows of a matrix that ``rank`` prunes."""
        if self.rule.target.is_stack:
            return slice(0, len(matrix) if expert % self._ranks.number == rank else 0)
        return Share.of(matrix, self.rule.pattern, 0.0, replace(self._ranks, own=rank)).rows

    def outcome(self, expert_tokens: Sequence[int] = ()) -> PrunedLayer:
        """Return the outcome, after :meth:`exchange`."""
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
            scales=torch.cat([self._scales[key] for key in sorted(self._scales)]) if self._scales else None,
        )

    def naming(self, expert: int = 0) -> AbstractContextManager[None]:
        """Add the layer, the expert and advice to a FloatingPointError."""
        return naming(f"{self.name}, expert {expert}" if self.rule.target.is_stack else self.name)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Statistics of layers' inputs for a method; all None to prune by magnitude."""

    norms: Tensor | None = None
    """(I,), for Wanda."""
    factor: InverseFactor | None = None
    """For SparseGPT."""
    gram: UnitGram | None = None
    """For ALPS."""


def inputs_of(method: Method, total: Tensor) -> Inputs:
    """Return a method's statistics from a sum over all tokens: of products, (I, I), or of squares, (I,).

    Squares are for Wanda and magnitude. Raises FloatingPointError.
    """
    if method == "sparsegpt":
        return Inputs(factor=inverse_factor(total))
    if method == "wanda":
        return Inputs(norms=total.sqrt())
    return Inputs(gram=unit_gram(total) if method == "alps" else None)


def equal_inputs(method: Method, number: int, device: torch.device) -> Inputs:
    """Return statistics for a layer without inputs, which rank its weights by magnitude."""
    if method != "sparsegpt":
        return Inputs()
    none_dead = torch.zeros(number, dtype=torch.bool, device=device)
    return Inputs(factor=InverseFactor(torch.eye(number, device=device), none_dead))


def prune_together(layers: Sequence[LayerPruning], given: Inputs, expert: int = 0) -> None:
    """Prune the matrices of linear ``layers`` with equal inputs, or of one ``expert`` of a stack.

    This rank prunes its share; :meth:`LayerPruning.exchange` follows. Rows are ranked as if each were multiplied by its
    ``rule.output_factors``. Collective over the ranks that share the rows.
    """
    parts = [_Part.of(layer, expert, number, given) for layer in layers for number in range(layer.num_matrices)]
    ranks = layers[0].ranks_of(expert)
    assert ranks is not None, "another rank prunes this expert"
    if given.gram is not None:
        made = alps_of_shares([part.share for part in parts], given.gram, ranks)
    else:
        made = [part.pruned(given, ranks) for part in parts]
    for part, found in zip(parts, made, strict=True):
        part.finish(found, given)


@dataclass(frozen=True, slots=True)
class _Part:
    """A matrix of a layer on its way through a method."""

    layer: LayerPruning
    place: tuple[int, int]
    """(expert, number of the fused matrix)."""
    share: Share
    """With rows multiplied by their factors."""
    factors: Tensor | None
    """(O, 1)."""

    @classmethod
    def of(cls, layer: LayerPruning, expert: int, number: int, given: Inputs) -> "_Part":
        rule, weight = layer.rule, layer.matrix(expert, number)
        statistics = given.gram or given.factor
        device = weight.device if statistics is None else statistics.dead.device
        weight, factors = weight.to(device), None
        if rule.output_factors is not None:
            first = number * len(weight)
            factors = rule.output_factors[first : first + len(weight)].to(device).unsqueeze(1)
            weight = weight.to(torch.float32) * factors
        share = Share.of(weight, rule.pattern, rule.sparsity, layer.ranks_of(expert) or ALONE)
        return cls(layer, (expert, number), share, factors)

    def pruned(self, given: Inputs, ranks: Ranks) -> Compensated:
        """Prune this rank's rows by SparseGPT, Wanda or magnitude. Collective."""
        rule, share, dtype = self.layer.rule, self.share, self.layer.weight.dtype
        if given.factor is None:
            weight, norms = share.weight.to(torch.float32), given.norms
            scores = weight.abs() if norms is None else wanda_scores(weight, norms)
            if not bool(torch.isfinite(scores).all()):  # of all rows, so on all ranks
                raise FloatingPointError("scores are not finite")
            masks = keep_by_scores([scores[rows] for rows in share.panels], share, ranks)
            panels = zip((weight[rows] for rows in share.panels), masks, strict=True)
            return joined([Compensated(*panel) for panel in panels], share)
        if rule.keeps_zeros:
            assert rule.grid is not None, "nothing to do"
            return round_under_mask(share, share.weight != 0, given.factor, rule.grid, dtype=dtype)
        return sparsegpt_of_share(share, given.factor, ranks, grid=rule.grid, dtype=dtype)

    def finish(self, made: Compensated, given: Inputs) -> None:
        """Write the outcome of this rank's rows."""
        rows = self.share.rows
        if given.factor is None and given.gram is None:  # the kept weights stay
            own = self.layer.matrix(*self.place)[rows].to(made.keep.device, copy=True)
            made = replace(made, weight=apply_mask_(own.contiguous(), made.keep))
        elif self.factors is not None:
            made = replace(made, weight=made.weight / self.factors[rows])
        self.layer.take(*self.place, rows, made)
