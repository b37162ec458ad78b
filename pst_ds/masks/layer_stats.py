"""Statistics of each layer: norms, and the correlation of scores with |W|. Every rank reads its shards in tiles; no
weight is gathered."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pst_ds.core import stats
from pst_ds.core.factors import SCORE_FACTORS, Factors, tile_factors
from pst_ds.core.keys import score_keys
from pst_ds.core.layout import Rect, StoredMatrix
from pst_ds.core.scores import updated_weight
from pst_ds.masks.layer_scores import LayerScores, current_base, whole_factors, with_contiguous_columns
from pst_ds.masks.updated_base import updated_base
from pst_ds.nn.inject import settled_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import group_sum

# Places in a layer's sums over its weights, which ranks add up in one tensor.
_MOMENTS = slice(0, 5)
""":func:`pst_ds.core.stats.score_moments` of S and |W|."""
_WEIGHT_SQUARES = 5
"""The square of W0."""
_UPDATE_SQUARES = 6
"""The square of W - W0, where the update form has no kernels."""
_NUM_SUMS = 7

# Places in a layer's norms, which come from factors that each rank has.
_SCORE_NORM = 0
_UPDATE_NORM = 1
_NUM_NORMS = 2


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Statistics of every PST layer, in model order; None where not applicable. The same on every rank."""

    correlation: list[float | None]
    """Pearson correlation of S with |W| / mean |W0|, for learned scores."""
    score_norm: list[float | None]
    """Frobenius norm of the learned part of S: alpha1 A B + alpha2 (R 1' + 1 C')."""
    update_norm: list[float | None]
    """Frobenius norm of W - W0, such as beta U V."""
    weight_norm: list[float | None]
    """Frobenius norm of W0, or of the trained weight that replaces it."""
    with_scores: bool
    """True if scores were measured."""

    @property
    def mean_correlation(self) -> float | None:
        """Mean over the layers with a correlation; None without any."""
        known = [value for value in self.correlation if value is not None]
        if not known:
            return None
        return math.fsum(known) / len(known)


@torch.no_grad()
def measure(model: nn.Module, *, with_scores: bool) -> LayerStats:
    """Return statistics of the PST layers of ``model``.

    Without ``with_scores``, only norms of updates and weights. Collective: one all-gather for all factors, and one
    exchange for all sums.
    """
    layers = settled_layers(model)
    parts = list(map(_Part, layers.items(), whole_factors(list(layers.values()))))
    any_weight = parts[0].layer.pst_mask
    sums_here: list[Tensor] = []
    norms_here: list[Tensor] = []
    is_counted: list[bool] = []
    is_on_ranks: list[bool] = []
    for part in parts:
        sums_here.append(part.sums(with_scores and part.learns_scores))
        norms_here.append(part.norms(with_scores))
        is_counted.append(part.counts_norms)
        is_on_ranks.append(part.layer.group is not None)
    here = torch.stack(sums_here)  # (layers, sums)
    norms = torch.stack(norms_here)  # (layers, norms)
    owned = norms.square() * torch.tensor(is_counted, device=norms.device).unsqueeze(1)
    # One exchange and one wait for the device: all numbers travel together.
    numbers = torch.cat([group_sum(torch.cat([here, owned], 1), any_weight), norms], 1).cpu()
    sums, owned, norms = numbers.split([_NUM_SUMS, _NUM_NORMS, _NUM_NORMS], 1)
    # Norms of stacks are over the experts of all ranks; those of other layers are the same on every rank.
    norms = torch.where(torch.tensor(is_on_ranks).unsqueeze(1), owned.sqrt(), norms)
    measured = LayerStats(correlation=[], score_norm=[], update_norm=[], weight_norm=[], with_scores=with_scores)
    for part, of_layer, norms_of_layer in zip(parts, sums, norms, strict=True):
        correlation = None
        score_norm = None
        if with_scores and part.learns_scores:
            correlation = stats.correlation(of_layer[_MOMENTS], part.numel)
            score_norm = part.score_norm(norms_of_layer)
        measured.correlation.append(correlation)
        measured.score_norm.append(score_norm)
        measured.update_norm.append(part.update_norm(norms_of_layer, of_layer))
        measured.weight_norm.append(_finite(math.sqrt(of_layer[_WEIGHT_SQUARES])))
    return measured


class _Part:
    """This rank's shard of one layer: its weights, fp32 masters if trained, and the keys of their scores."""

    def __init__(self, named: tuple[str, PSTLayer], factors: Factors):
        name, self.layer = named
        self._factors = factors
        if self.layer.layout.transposed:
            self._factors = with_contiguous_columns(factors)
        self._weight = current_base(self.layer)
        self._updated = updated_base(self.layer, self._weight, factors)
        """With the update of a form without kernels, whose parameters are then not in the factors."""
        of_keys = factors
        if factors.update:
            self._factors = self._factors.of_scores()
            of_keys = self._factors
        base = self._updated
        if self.layer.constants.frozen_magnitude:
            base = self._weight
        self._keys = LayerScores(name, self.layer, of_keys, base)
        self.numel = self.layer.whole_layout.numel
        self.counts_norms = self.layer.group is not None and sharding.shard_index(self.layer.pst_mask) == 0
        """True on one of the ranks that own the same experts of a stack, whose norms are added up."""
        self.learns_scores = any(getattr(self.layer, f"pst_{name}") is not None for name in SCORE_FACTORS)

    def sums(self, with_scores: bool) -> Tensor:
        """Return sums over this rank's weights, (_NUM_SUMS,) float64; sums of scores only ``with_scores``."""
        # double precision: sums of billions of squares
        sums = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=self._weight.device)
        constants = self.layer.constants
        for matrix, rect in self._rects():
            weight = self._weight.rect(rect)
            sums[_WEIGHT_SQUARES] += stats.square_sum(weight)
            start = self._updated.rect(rect)
            if self._updated is not self._weight:
                sums[_UPDATE_SQUARES] += stats.square_sum(start - weight)
            if not with_scores:
                continue
            tile = tile_factors(self._factors, self.layer.layout, matrix, rect)
            scale = self.layer.magnitude_scales[matrix.index]
            updated = updated_weight(start.float(), tile, constants)
            scored = start
            if constants.frozen_magnitude:
                scored = weight
            sums[_MOMENTS] += stats.score_moments(score_keys(scored, tile, constants, scale), updated, scale)
        return sums

    def norms(self, with_scores: bool) -> Tensor:
        """Return the norms of the low-rank part of the scores and of beta U V of own experts, (_NUM_NORMS,) float64."""
        norms = torch.zeros(_NUM_NORMS, dtype=torch.float64, device=self._weight.device)
        layout = self.layer.layout
        constants = self.layer.constants
        if with_scores and self.learns_scores:
            norms[_SCORE_NORM] = stats.learned_score_norm(layout, self._factors, constants)
        # of other forms, the square of W - W0 is summed over weights
        if self.layer.update_specs and constants.form.is_product:
            norms[_UPDATE_NORM] = stats.update_norm(layout, self._factors, constants)
        return norms

    def score_norm(self, norms: Tensor) -> float | None:
        """Return the norm of the learned part of the scores; None if it is not finite."""
        return _finite(float(norms[_SCORE_NORM]))

    def update_norm(self, norms: Tensor, sums: Tensor) -> float | None:
        """Return the norm of W - W0; None without an update, or if it is not finite."""
        if not self.layer.update_specs:
            return None
        if self.layer.constants.form.is_product:
            return _finite(float(norms[_UPDATE_NORM]))
        return _finite(math.sqrt(sums[_UPDATE_SQUARES]))

    def _rects(self) -> Iterator[tuple[StoredMatrix, Rect]]:
        """Yield the rectangles of this rank's weights, with their matrix."""
        for matrix in self._keys.matrices:
            for rect in self._keys.own_rects(matrix):
                yield matrix, rect


def _finite(value: float) -> float | None:
    """Return ``value``, or None for NaN and infinity, which JSON does not have."""
    if not math.isfinite(value):
        return None
    return value
