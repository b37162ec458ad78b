"""Statistics of each layer: norms, correlation of scores with |W|, and histograms. Every rank reads its
shards in tiles; no weight is gathered."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pst_ds.config.pst import name_matches
from pst_ds.config.settings import ConfigError
from pst_ds.core import stats
from pst_ds.core.bits import unpack_shard
from pst_ds.core.factors import Factors, tile_factors
from pst_ds.core.keys import score_keys, scores_of_keys
from pst_ds.core.layout import Rect, StoredMatrix, view_in_shard
from pst_ds.core.scores import updated_weight
from pst_ds.masks.layer_scores import LayerScores, current_base, whole_factors, with_contiguous_columns
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import SCORE_FACTORS, PSTLayer
from pst_ds.parallel import zero3
from pst_ds.parallel.ranks import group_sum

_MOMENTS, _OF_SCORES = slice(0, 5), slice(0, 3, 2)
_WEIGHT_SQUARES, _NUM_SUMS = 5, 6
"""Places in a layer's sums: :func:`pst_ds.core.stats.score_moments` of S and |W| (S and its square among them), and the
square of W0."""
_SCORE_NORM, _UPDATE_NORM, _NUM_NORMS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class ScoreHistogram:
    """Counts of one layer's scores in equal bins of [low, high]; outliers count in the first and last bin."""

    layer: int
    low: float
    high: float
    kept: list[int]
    pruned: list[int]
    threshold: float | None
    """Score at which an update would cut now; None if the layer has no single threshold."""


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Statistics of every PST layer, in model order; None where not applicable. The same on every rank."""

    correlation: list[float | None]
    """Pearson correlation of S with |W| / mean |W0|, for learned scores."""
    score_norm: list[float | None]
    """Frobenius norm of the learned part of S: alpha1 A B + alpha2 (R 1' + 1 C')."""
    update_norm: list[float | None]
    """Frobenius norm of beta U V."""
    weight_norm: list[float | None]
    """Frobenius norm of W0, or of the trained weight that replaces it."""
    with_scores: bool
    """True if scores and masks were measured."""
    histograms: list[ScoreHistogram] = field(default_factory=list)

    @property
    def mean_correlation(self) -> float | None:
        """Mean over the layers with a correlation; None without any."""
        known = [value for value in self.correlation if value is not None]
        return math.fsum(known) / len(known) if known else None


def chosen_layers(names: Sequence[str], asked: Sequence[str]) -> list[int]:
    """Return the indices of the layers that match ``asked``; by default of the first, middle and last.

    Raises ConfigError for an entry of ``asked`` that matches no layer, if there are any.
    """
    if not names:
        return []
    if not asked:
        return sorted({0, (len(names) - 1) // 2, len(names) - 1})
    for entry in asked:
        if not any(name_matches(name, [entry]) for name in names):
            near = difflib.get_close_matches(entry, names, n=3, cutoff=0.4) or names[:3]
            raise ConfigError(
                f"pictures.layers: {entry!r} is not a pruned layer. Give a name or its dotted ending; similar are "
                f"{', '.join(near)}"
            )
    return [i for i, name in enumerate(names) if name_matches(name, asked)]


@torch.no_grad()
def measure(model: nn.Module, chosen: Sequence[int], *, with_scores: bool) -> LayerStats:
    """Return statistics of the PST layers of ``model``, with histograms of the ``chosen`` ones.

    Without ``with_scores``, only norms of updates and weights. Collective: one all-gather for all factors, one exchange
    for all sums, and one for all counts.
    """
    layers = pst_layers(model)
    parts = [_Part(*each) for each in zip(layers.items(), whole_factors(list(layers.values())), strict=True)]
    any_weight = parts[0].layer.pst_mask
    here = [part.sums(with_scores and (part.learns_scores or i in chosen)) for i, part in enumerate(parts)]
    norms = torch.stack([part.norms(with_scores) for part in parts])
    numbers = torch.cat([group_sum(torch.stack(here), any_weight), norms], 1).cpu()
    sums, norms = numbers.split([_NUM_SUMS, _NUM_NORMS], 1)
    found = LayerStats(
        [
            stats.correlation(s[_MOMENTS], part.numel) if with_scores and part.learns_scores else None
            for part, s in zip(parts, sums, strict=True)
        ],
        [part.score_norm(n) if with_scores else None for part, n in zip(parts, norms, strict=True)],
        [part.update_norm(n) for part, n in zip(parts, norms, strict=True)],
        [_finite(math.sqrt(s[_WEIGHT_SQUARES])) for s in sums],
        with_scores,
    )
    finite = [i for i in chosen if bool(sums[i].isfinite().all())]
    if with_scores and finite:
        moments = {i: sums[i][_OF_SCORES].tolist() for i in finite}
        ranges = [stats.histogram_range(total, squares, parts[i].numel) for i, (total, squares) in moments.items()]
        counts = [parts[i].counts(*bounds) for i, bounds in zip(finite, ranges, strict=True)]
        summed = group_sum(torch.stack(counts), any_weight).cpu()
        for i, bounds, bins in zip(finite, ranges, summed, strict=True):
            found.histograms.append(_histogram(i, parts[i].layer, bounds, bins))
    return found


class _Part:
    """This rank's shard of one layer: its weights, fp32 masters if trained, and the keys of their scores."""

    def __init__(self, named: tuple[str, PSTLayer], factors: Factors):
        name, self.layer = named
        self._factors = with_contiguous_columns(factors) if self.layer.layout.transposed else factors
        self._weight = current_base(self.layer)
        self._keys = LayerScores(name, self.layer, factors, self._weight)
        self.numel = self.layer.layout.numel  # of the whole layer
        self.learns_scores = any(getattr(self.layer, f"pst_{name}") is not None for name in SCORE_FACTORS)

    def sums(self, with_scores: bool) -> Tensor:
        """Return sums over this rank's weights, (_NUM_SUMS,) float64; sums of scores only ``with_scores``."""
        sums, constants = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=self._weight.device), self.layer.constants
        for matrix, rect in self._rects():
            weight = self._weight.rect(rect)
            sums[_WEIGHT_SQUARES] += stats.square_sum(weight)
            if not with_scores:
                continue
            tile = tile_factors(self._factors, self.layer.layout, matrix, rect)
            updated, scale = updated_weight(weight.float(), tile, constants), self.layer.magnitude_scales[matrix.index]
            sums[_MOMENTS] += stats.score_moments(score_keys(weight, tile, constants, scale), updated, scale)
        return sums

    def norms(self, with_scores: bool) -> Tensor:
        """Return the norms of the low-rank part of the scores and of beta U V, (_NUM_NORMS,) float64."""
        norms = torch.zeros(_NUM_NORMS, dtype=torch.float64, device=self._weight.device)
        layout, constants = self.layer.layout, self.layer.constants
        if with_scores and self.learns_scores:
            norms[_SCORE_NORM] = stats.learned_score_norm(layout, self._factors, constants)
        if self.layer.pst_U is not None:
            norms[_UPDATE_NORM] = stats.update_norm(layout, self._factors, constants)
        return norms

    def counts(self, low: float, high: float) -> Tensor:
        """Return this rank's counts of scores per bin, (2, bins) int64: pruned, then kept."""
        kept_here = unpack_shard(zero3.shard_of(self.layer.pst_mask).values, self._weight.stop - self._weight.start)
        bins = torch.zeros(2, stats.HISTOGRAM_BINS, dtype=torch.int64, device=kept_here.device)
        for matrix, rect in self._rects():
            kept = view_in_shard(kept_here, rect, self._weight.row_length, self._weight.start)
            scores = scores_of_keys(self._keys.keys(matrix, rect))  # as used to select masks
            bins += stats.count_in_bins(scores, kept, low, high)
        return bins

    def score_norm(self, norms: Tensor) -> float | None:
        return _finite(float(norms[_SCORE_NORM])) if self.learns_scores else None

    def update_norm(self, norms: Tensor) -> float | None:
        return None if self.layer.pst_U is None else _finite(float(norms[_UPDATE_NORM]))

    def _rects(self) -> Iterator[tuple[StoredMatrix, Rect]]:
        return ((matrix, rect) for matrix in self._keys.matrices for rect in self._keys.own_rects(matrix))


def _finite(value: float) -> float | None:
    """Return ``value``, or None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _histogram(index: int, layer: PSTLayer, bounds: tuple[float, float], counts: Tensor) -> ScoreHistogram:
    pruned, kept = counts
    kind = layer.rule.pattern.kind
    one_threshold = layer.rule.pattern.pools_matrices or (kind == "matrix" and layer.layout.num_matrices == 1)
    threshold = stats.cut_in_bins(pruned + kept, int(pruned.sum()), *bounds) if one_threshold else None
    return ScoreHistogram(index, *bounds, kept.tolist(), pruned.tolist(), threshold)
