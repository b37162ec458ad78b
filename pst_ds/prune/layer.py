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
        self.rule = rule
        self._ranks = ranks
        # Held now: while the block is on the device, the parameter's data may be a copy, perhaps in another dtype.
        self.weight = rule.target.weight.data
        self._kept = 0
        self._scales: dict[tuple[int, int], Tensor] = {}  # by (expert, matrix); only this rank's rows until exchange
        self.name = rule.target.name
        self.num_experts = rule.target.layout.num_experts
        self.num_matrices = rule.target.layout.expert.num_matrices
        """Fused matrices of an expert."""

    def matrix(self, expert: int, number: int) -> Tensor:
        """Return a matrix of the stored weight as a view, (O, I)."""
        layout = self.rule.target.layout.expert
        height = layout.shape[0]
        rows = self.weight.flatten(0, -2)[expert * height : (expert + 1) * height]  # the stored form of the expert
        part = rows[list(layout.matrices())[number].rect.slices]
        if layout.transposed:
            return part.t()
        return part

    def require_finite(self) -> None:
        """Raise FloatingPointError, on all ranks, for weights that are not finite."""
        with self.naming():
            if not bool(torch.isfinite(self.weight).all()):
                raise FloatingPointError("weights are not finite")

    def ranks_of(self, expert: int) -> Ranks | None:
        """Return the ranks that share an expert's rows; None if another rank prunes this expert of a stack."""
        if not self.rule.target.is_stack:
            return self._ranks
        if expert % self._ranks.number != self._ranks.own:
            return None
        return ALONE

    def store(self, expert: int, number: int, rows: slice, pruned: Compensated) -> None:
        """Write the outcome for ``rows`` of a matrix into the stored weight."""
        matrix = self.matrix(expert, number)
        matrix[rows] = pruned.weight.to(self.weight.device, self.weight.dtype)
        self._kept += int(pruned.keep.sum())
        if pruned.scales is not None:
            scales = pruned.scales.new_zeros(len(matrix), pruned.scales.shape[1])  # (O, groups)
            scales[rows] = pruned.scales
            self._scales[expert, number] = scales.cpu()

    def exchange(self) -> None:
        """Give every rank the rows of all others. Collective. Raises FloatingPointError, on all."""
        if self._ranks.number > 1:
            self._exchange_rows()
        # After the exchange, every rank sees all rows, so that all raise or none.
        if not bool(torch.isfinite(self.weight).all()):
            with self.naming():
                raise FloatingPointError("the pruned weights are not finite")
        resident = self.rule.target.weight.data
        if resident.data_ptr() != self.weight.data_ptr():
            resident.copy_(self.weight)

    def _exchange_rows(self) -> None:
        self._kept = int(self._ranks.sums.all_sum(torch.tensor(self._kept)))
        # The same order of broadcasts on every rank: expert, matrix, source.
        for expert in range(self.num_experts):
            for number in range(self.num_matrices):
                self._exchange_matrix(expert, number)

    def _exchange_matrix(self, expert: int, number: int) -> None:
        """Broadcast each rank's rows of a matrix and their scales, one source after another. Collective."""
        matrix = self.matrix(expert, number)
        device = self.rule.target.weight.device  # collectives of an accelerator need their tensors there
        grid = self.rule.grid
        if grid is not None:
            groups = grid.num_groups(self.rule.target.layout.in_features)
            # A rank that prunes no row of this matrix has no scales of it yet, and receives them here.
            scales = self._scales.setdefault((expert, number), torch.zeros(len(matrix), groups, dtype=SCALE_DTYPE))
        for source in range(self._ranks.number):
            rows = self._rows_of(source, expert, matrix)
            if rows.start == rows.stop:
                continue  # on all ranks: rows follow from the shape
            received = self._ranks.broadcast(matrix[rows].contiguous().to(device), source)
            matrix[rows] = received.to(matrix.device)
            if grid is not None:
                scales[rows] = self._ranks.broadcast(scales[rows].to(device), source).cpu()

    def _rows_of(self, rank: int, expert: int, matrix: Tensor) -> slice:
        """Return the rows of a matrix that ``rank`` prunes."""
        if not self.rule.target.is_stack:
            share = Share.of(matrix, self.rule.pattern, sparsity=0.0, ranks=replace(self._ranks, own=rank))
            return share.rows
        if expert % self._ranks.number == rank:
            return slice(0, len(matrix))
        return slice(0, 0)

    def outcome(self, expert_tokens: Sequence[int] = ()) -> PrunedLayer:
        """Return the outcome, after :meth:`exchange`."""
        rule = self.rule
        layout = rule.target.layout
        pruned = layout.numel - self._kept
        pattern = str(rule.pattern)
        sparsity = rule.sparsity
        if rule.keeps_zeros:  # the weight's zeros decide, and the rule's pattern and sparsity have no effect
            pattern = "zeros"
            sparsity = pruned / layout.numel
        expert_zeros: list[int] = []
        if rule.target.is_stack:
            expert_zeros = [_zeros_in(expert) for expert in self.weight]
        scales = None
        if self._scales:
            # Sorted by (expert, matrix), the order in which rows are stored.
            scales = torch.cat([self._scales[place] for place in sorted(self._scales)])
        return PrunedLayer(
            name=self.name,
            shape=(layout.out_features, layout.in_features),
            matrices=layout.num_matrices,
            pattern=pattern,
            sparsity_requested=sparsity,
            pruned=pruned,
            zeros=_zeros_in(self.weight),
            dtype=str(self.weight.dtype).removeprefix("torch."),
            expert_zeros=tuple(expert_zeros),
            expert_tokens=tuple(expert_tokens),
            scales=scales,
        )

    def naming(self, expert: int = 0) -> AbstractContextManager[None]:
        """Add the layer, the expert and advice to a FloatingPointError."""
        if self.rule.target.is_stack:
            return naming(f"{self.name}, expert {expert}")
        return naming(self.name)


def _zeros_in(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))


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
    if method == "alps":
        return Inputs(gram=unit_gram(total))
    return Inputs()


def equal_inputs(method: Method, number: int, device: torch.device) -> Inputs:
    """Return statistics for a layer without inputs, which rank its weights by magnitude."""
    if method != "sparsegpt":
        return Inputs()
    # SparseGPT also quantises, and needs a factor for that. With H = 1, its score w^2 / U_jj^2 ranks by magnitude.
    none_dead = torch.zeros(number, dtype=torch.bool, device=device)
    return Inputs(factor=InverseFactor(torch.eye(number, device=device), none_dead))


def prune_together(layers: Sequence[LayerPruning], inputs: Inputs, expert: int = 0) -> None:
    """Prune the matrices of linear ``layers`` with equal inputs, or of one ``expert`` of a stack.

    This rank prunes its share; :meth:`LayerPruning.exchange` follows. Rows are ranked as if each were multiplied by its
    ``rule.output_factors``. Collective over the ranks that share the rows.
    """
    ranks = layers[0].ranks_of(expert)
    assert ranks is not None, "another rank prunes this expert"
    parts: list[_Part] = []
    for layer in layers:
        for number in range(layer.num_matrices):
            parts.append(_Part.of(layer, expert, number, inputs=inputs))
    if inputs.gram is not None:
        # Together: ALPS inverts its penalised Gram matrix once for all matrices with these inputs.
        outcomes = alps_of_shares([part.share for part in parts], inputs.gram, ranks)
    else:
        outcomes = [part.pruned(inputs, ranks) for part in parts]
    for part, outcome in zip(parts, outcomes, strict=True):
        part.finish(outcome, inputs)


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
    def of(cls, layer: LayerPruning, expert: int, number: int, *, inputs: Inputs) -> "_Part":
        rule = layer.rule
        weight = layer.matrix(expert, number)
        statistics = inputs.gram or inputs.factor
        if statistics is not None:  # the products run where the statistics are; scores are computed where the weight is
            weight = weight.to(statistics.dead.device)
        factors = None
        if rule.output_factors is not None:
            first = number * len(weight)  # fused matrices follow each other in the outputs, and have equal heights
            factors = rule.output_factors[first : first + len(weight)].to(weight.device).unsqueeze(1)
            weight = weight.to(torch.float32) * factors
        share = Share.of(weight, rule.pattern, rule.sparsity, ranks=layer.ranks_of(expert) or ALONE)
        return cls(layer, place=(expert, number), share=share, factors=factors)

    def pruned(self, inputs: Inputs, ranks: Ranks) -> Compensated:
        """Prune this rank's rows by SparseGPT, Wanda or magnitude. Collective."""
        rule = self.layer.rule
        stored_dtype = self.layer.weight.dtype
        if inputs.factor is None:
            return self._pruned_by_scores(inputs.norms, ranks)
        if rule.keeps_zeros:
            assert rule.grid is not None, "nothing to do"
            keep = self.share.weight != 0
            return round_under_mask(self.share, keep, inputs.factor, rule.grid, dtype=stored_dtype)
        return sparsegpt_of_share(self.share, inputs.factor, ranks, grid=rule.grid, dtype=stored_dtype)

    def _pruned_by_scores(self, norms: Tensor | None, ranks: Ranks) -> Compensated:
        """Prune by Wanda's scores, or by magnitude without ``norms``. Collective."""
        weight = self.share.weight.to(torch.float32)
        scores = weight.abs() if norms is None else wanda_scores(weight, norms)
        # Of all rows, not only of this rank's, so that all ranks raise or none.
        if not bool(torch.isfinite(scores).all()):
            raise FloatingPointError("scores are not finite")
        masks = keep_by_scores([scores[rows] for rows in self.share.panels], self.share, ranks)
        panels: list[Compensated] = []
        for rows, keep in zip(self.share.panels, masks, strict=True):
            panels.append(Compensated(weight[rows], keep))
        return joined(panels, self.share)

    def finish(self, outcome: Compensated, inputs: Inputs) -> None:
        """Write the outcome of this rank's rows."""
        rows = self.share.rows
        expert, number = self.place
        if inputs.factor is None and inputs.gram is None:
            # Scores leave the kept weights unchanged. They come from the stored weight, whose bits a product with the
            # factors and a division by them need not restore.
            stored = self.layer.matrix(expert, number)[rows].to(outcome.keep.device, copy=True)
            outcome = replace(outcome, weight=apply_mask_(stored.contiguous(), outcome.keep))
        elif self.factors is not None:
            outcome = replace(outcome, weight=outcome.weight / self.factors[rows])
        self.layer.store(expert, number, rows, outcome)
