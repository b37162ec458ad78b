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

_MOMENTS = slice(0, 5)
_WEIGHT_SQUARES, _UPDATE_SQUARES, _NUM_SUMS = 5, 6, 7
"""Places in a layer's sums: :func:`pst_ds.core.stats.score_moments` of S and |W|, the square of W0, and that of W - W0
where the update form has no kernels."""
_SCORE_NORM, _UPDATE_NORM, _NUM_NORMS = 0, 1, 2


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
        return math.fsum(known) / len(known) if known else None


@torch.no_grad()
def measure(model: nn.Module, *, with_scores: bool) -> LayerStats:
    """Return statistics of the PST layers of ``model``.

    Without ``with_scores``, only norms of updates and weights. Collective: one all-gather for all factors, and one
    exchange for all sums.
    """
    layers = settled_layers(model)
    parts = [_Part(*each) for each in zip(layers.items(), whole_factors(list(layers.values())), strict=True)]
    any_weight = parts[0].layer.pst_mask
    here = torch.stack([part.sums(with_scores and part.learns_scores) for part in parts])
    norms = torch.stack([part.norms(with_scores) for part in parts])
    owned = torch.stack([norm.square() * part.counts_norms for norm, part in zip(norms, parts, strict=True)])
    numbers = torch.cat([group_sum(torch.cat([here, owned], 1), any_weight), norms], 1).cpu()
    sums, owned, norms = numbers.split([_NUM_SUMS, _NUM_NORMS, _NUM_NORMS], 1)
    on_ranks = torch.tensor([part.layer.group is not None for part in parts]).unsqueeze(1)
    norms = torch.where(on_ranks, owned.sqrt(), norms)
    return LayerStats(
        [
            stats.correlation(s[_MOMENTS], part.numel) if with_scores and part.learns_scores else None
            for part, s in zip(parts, sums, strict=True)
        ],
        [part.score_norm(n) if with_scores else None for part, n in zip(parts, norms, strict=True)],
        [part.update_norm(n, s) for part, n, s in zip(parts, norms, sums, strict=True)],
        [_finite(math.sqrt(s[_WEIGHT_SQUARES])) for s in sums],
        with_scores,
    )


class _Part:
    """This rank's shard of one layer: its weights, fp32 masters if trained, and the keys of their scores."""

    def __init__(self, named: tuple[str, PSTLayer], factors: Factors):
        name, self.layer = named
        self._factors = with_contiguous_columns(factors) if self.layer.layout.transposed else factors
        self._weight = current_base(self.layer)
        self._updated = updated_base(self.layer, self._weight, factors)
        """With the update of a form without kernels, whose parameters are then not in the factors."""
        if factors.update:
            self._factors = self._factors.of_scores()
        base = self._weight if self.layer.constants.frozen_magnitude else self._updated
        self._keys = LayerScores(name, self.layer, self._factors if factors.update else factors, base)
        self.numel = self.layer.whole_layout.numel
        self.counts_norms = self.layer.group is not None and sharding.shard_index(self.layer.pst_mask) == 0
        """True on one of the ranks that own the same experts of a stack, whose norms are added up."""
        self.learns_scores = any(getattr(self.layer, f"pst_{name}") is not None for name in SCORE_FACTORS)

    def sums(self, with_scores: bool) -> Tensor:
        """Return sums over this rank's weights, (_NUM_SUMS,) float64; sums of scores only ``with_scores``."""
        sums, constants = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=self._weight.device), self.layer.constants
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
            scored = weight if constants.frozen_magnitude else start
            sums[_MOMENTS] += stats.score_moments(score_keys(scored, tile, constants, scale), updated, scale)
        return sums

    def norms(self, with_scores: bool) -> Tensor:
        """Return the norms of the low-rank part of the scores and of beta U V of own experts, (_NUM_NORMS,) float64."""
        norms = torch.zeros(_NUM_NORMS, dtype=torch.float64, device=self._weight.device)
        layout, constants = self.layer.layout, self.layer.constants
        if with_scores and self.learns_scores:
            norms[_SCORE_NORM] = stats.learned_score_norm(layout, self._factors, constants)
        if self.layer.update_specs and self.layer.constants.form.has_kernels:
            norms[_UPDATE_NORM] = stats.update_norm(layout, self._factors, constants)
        return norms

    def score_norm(self, norms: Tensor) -> float | None:
        return _finite(float(norms[_SCORE_NORM])) if self.learns_scores else None

    def update_norm(self, norms: Tensor, sums: Tensor) -> float | None:
        if not self.layer.update_specs:
            return None
        if self.layer.constants.form.has_kernels:
            return _finite(float(norms[_UPDATE_NORM]))
        return _finite(math.sqrt(sums[_UPDATE_SQUARES]))

    def _rects(self) -> Iterator[tuple[StoredMatrix, Rect]]:
        return ((matrix, rect) for matrix in self._keys.matrices for rect in self._keys.own_rects(matrix))


def _finite(value: float) -> float | None:
    """Return ``value``, or None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
