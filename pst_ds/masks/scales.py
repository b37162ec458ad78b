"""Search the quantisation scales of every layer with a grid: each rank in its shard, and no weight is gathered.

All ranks together search the groups that a shard boundary cuts: each adds its part of the deciding sums. These are
integers, so scales are the same for every world size. All such groups are searched at once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from pst_ds.core.bits import unpack_shard
from pst_ds.core.coded_weight import OwnWeights
from pst_ds.core.factors import Factors, tile_factors
from pst_ds.core.layout import Rect, StoredMatrix, row_tiles, shard_tiles, view_in_shard
from pst_ds.core.quantization import (
    SCALE_DTYPE,
    Grid,
    bytes_of_scales,
    group_losses,
    group_moments,
    group_scales,
    larger_end,
    search_scales,
    whole_weights,
)
from pst_ds.core.scores import sliced_weight
from pst_ds.core.units import unit_tiles
from pst_ds.errors import shortened
from pst_ds.masks.layer_scores import current_base, whole_factors, with_contiguous_columns
from pst_ds.masks.updated_base import updated_base
from pst_ds.nn.inject import settled_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import group_max, group_sum

_TILE_ELEMENTS = {"cpu": 1 << 20}
"""Weights per search, which makes about 400 calls, by device; other devices take 1 << 24."""
_BAND_ELEMENTS = {"cpu": 1 << 17}
"""Weights merged at once, so that they stay in the cache; other devices take 1 << 24."""
_BATCH_WEIGHTS = 1 << 24
"""Most weights of cut groups on a rank in a batch of layers."""
_BATCH_SCALES = 1 << 22
"""Most scales in the exchange of a batch."""


@dataclass(frozen=True, slots=True)
class RoundingStats:
    """Quantisation error with the new scales; the same on every rank."""

    errors: tuple[float, ...]
    """Sum of (M . W - quantised)^2 of each layer with a grid, in model order."""
    squares: tuple[float, ...]
    """Sum of (M . W)^2 of each layer with a grid."""

    @property
    def error(self) -> float:
        """Return |M . W - quantised| / |M . W| over all layers together."""
        return _relative(math.fsum(self.errors), math.fsum(self.squares))

    @property
    def layer_errors(self) -> list[float]:
        """Return |M . W - quantised| / |M . W| of each layer with a grid, in model order."""
        return list(map(_relative, self.errors, self.squares))


def _relative(error: float, square: float) -> float:
    if square == 0.0:  # all weights are masked
        return 0.0
    return math.sqrt(error / square)


@torch.no_grad()
def update_scales(model: nn.Module) -> RoundingStats:
    """Choose the scales of least squared error for the current M . W, from the fp32 masters; return the error.

    Collective, with about 16 exchanges per batch of layers. Raises FloatingPointError on every rank, naming the layers,
    for weights that are not finite.
    """
    named: dict[str, PSTLayer] = {}
    for name, layer in settled_layers(model).items():
        if layer.stored_grid is not None:
            named[name] = layer
    factors = whole_factors(list(named.values()), with_scores=False)
    weights = list(map(_ShardWeights, named, named.values(), factors))
    errors: list[float] = []
    squares: list[float] = []
    for batch in _batches(weights):
        scales, losses = _searched(batch)
        bad: list[str] = []
        for own, loss in zip(batch, losses, strict=True):
            if not all(map(math.isfinite, loss)):
                bad.append(own.name)
        # The losses are sums over all ranks, so that all ranks raise or none.
        if bad:
            raise FloatingPointError(
                f"weights of {shortened(bad)} are not finite. Lower the learning rate of the updates, or resume from "
                "the last checkpoint"
            )
        for own, table in zip(batch, scales, strict=True):
            assert own.layer.pst_scales is not None
            sharding.write_whole(own.layer.pst_scales, bytes_of_scales(table))
        for error, square in losses:
            errors.append(error)
            squares.append(square)
    return RoundingStats(tuple(errors), tuple(squares))


class _ShardWeights:
    """This rank's shard of M . W of one layer, and the quantisation groups in it."""

    def __init__(self, name: str, layer: PSTLayer, factors: Factors):
        assert layer.stored_grid is not None
        self.name = name
        self.layer = layer
        self.stored = layer.stored_grid
        self.grid = layer.stored_grid.grid
        self._split = layer.split()
        self.layout = layer.layout
        self.row_length = layer.layout.shape[1]
        self._whole_factors = factors
        # an update without kernels is in the weights that open() makes
        self._factors = replace(factors, update={})
        if self.layout.transposed:
            self._factors = with_contiguous_columns(self._factors)
        self._own: OwnWeights | None = None

    def open(self) -> None:
        """Look up the masters and unpack the mask. Collective if :func:`sharding.master_shard` is."""
        self._own = updated_base(self.layer, current_base(self.layer), self._whole_factors)
        self.start = self._own.start
        self.stop = self._own.stop
        self.device = self._own.device
        self._keep = unpack_shard(self.layer.own_bits(), self.stop - self.start).bool()
        period = self.stored.period
        first = -(-self.start // period) * period
        last = self.stop // period * period
        if first >= last:  # a part of one period, or of two
            first = last = self.stop
        self.whole = (first, last)
        """Flat range of the periods that lie entirely in this shard."""

    def close(self) -> None:
        """Free the weights and the mask. A batch has one layer open at a time."""
        self._own = None
        del self._keep

    @property
    def cut_periods(self) -> list[int]:
        """Numbers of the periods that lie in more than one shard; the same on every rank."""
        share = self._split.share
        period = self.stored.period
        if share == 0:
            return []
        # where one shard ends and the next starts
        edges = range(share, self.layout.numel, share)
        return sorted({edge // period for edge in edges if edge % period})

    @property
    def most_cut_weights(self) -> int:
        """Upper bound of the weights of cut groups in a shard."""
        return min(self._split.share, 2 * self.stored.period)

    def whole_groups(self) -> Iterator[tuple[Rect, Tensor]]:
        """Yield (rectangle, its groups as rows, fp32) of the groups that lie entirely in this shard."""
        size = _TILE_ELEMENTS.get(self.device.type, 1 << 24)
        for matrix in self.layout.matrices():
            for rect in unit_tiles(matrix.rect, self.stored.unit, self.row_length, *self.whole, size):
                yield rect, self.stored.grouped(self._masked(matrix, rect))

    def cut_groups(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the first group among the layer's cut groups, this shard's part of groups as rows, fp32)."""
        first_group_of: dict[int, int] = {}
        for number, period in enumerate(self.cut_periods):
            first_group_of[period] = number * self.stored.groups_per_period
        # what lies before and after the whole periods
        for start, stop in ((self.start, self.whole[0]), (self.whole[1], self.stop)):
            for matrix in self.layout.matrices():
                for rect in self._cut_rects(matrix.rect, start, stop):
                    weight = self._masked(matrix, rect)
                    first = first_group_of[(rect.r0 * self.row_length + rect.c0) // self.stored.period]
                    # a group is a part of a column there
                    if self.layout.transposed:
                        yield first + rect.c0, weight.t().contiguous()
                    else:
                        yield first, weight

    def _cut_rects(self, matrix: Rect, start: int, stop: int) -> Iterator[Rect]:
        """Yield the rectangles of a matrix in [start, stop), each within one period."""
        period = self.stored.period
        while start < stop:
            end = min(stop, (start // period + 1) * period)
            yield from shard_tiles(matrix, self.row_length, start, end, 1 << 62)
            start = end

    def _masked(self, matrix: StoredMatrix, rect: Rect) -> Tensor:
        """Return M . W of a rectangle, fp32, bit-identical for every choice of rectangles."""
        assert self._own is not None
        merged = torch.empty(rect.shape, device=self.device)
        for band in row_tiles(rect, _BAND_ELEMENTS.get(self.device.type, 1 << 24)):
            own = self._own.rect(band)
            keep = view_in_shard(self._keep, band, self.row_length, self.start)
            tile = tile_factors(self._factors, self.layout, matrix, band)
            updated = sliced_weight(own, tile, self.layer.constants)
            merged[band.inside(rect)] = updated.masked_fill_(~keep, 0.0)
        return merged


def _batches(weights: Sequence[_ShardWeights]) -> Iterator[list[_ShardWeights]]:
    """Yield batches of layers, in order, within the limits and held by the same ranks; the same on every rank."""
    batch: list[_ShardWeights] = []
    cut = 0
    scales = 0
    for own in weights:
        cut += own.most_cut_weights
        scales += own.stored.num_scales
        is_full = cut > _BATCH_WEIGHTS or scales > _BATCH_SCALES
        # the collectives of a batch are over the ranks that hold its layers
        if batch and (is_full or own.layer.group is not batch[0].layer.group):
            yield batch
            batch = []
            cut = own.most_cut_weights
            scales = own.stored.num_scales
        batch.append(own)
    if batch:
        yield batch


def _searched(batch: list[_ShardWeights]) -> tuple[list[Tensor], list[list[float]]]:
    """Return the scales of each layer, and its [squared error, sum of squares]. Collective."""
    any_weight = batch[0].layer.pst_mask
    grid = batch[0].grid
    dtype = batch[0].layer.dtype
    tables: list[Tensor] = []
    sums = torch.zeros(len(batch), 2, dtype=torch.float64)  # (layers, squared error and square)
    numbers = [len(own.cut_periods) * own.stored.groups_per_period for own in batch]
    firsts = [0, *accumulate(numbers)]
    cut: list[tuple[int, int, Tensor]] = []  # layer, first group among all cut ones, this rank's part of groups
    for i, own in enumerate(batch):
        own.open()
        table = torch.zeros(own.stored.shape, dtype=SCALE_DTYPE, device=own.device)
        for rect, grouped in own.whole_groups():
            found = group_scales(_finite(grouped), grid, own.layer.dtype)
            tall, wide = own.stored.unit
            at = Rect(rect.r0 // tall, rect.r1 // tall, rect.c0 // wide, rect.c1 // wide)
            table[at.slices] = found.view(at.shape)
            sums[i] += _loss(grouped, found.float(), grid)
        for first, grouped in own.cut_groups():
            cut.append((i, firsts[i] + first, grouped))
        own.close()
        tables.append(table)
    of_cut = _cut_group_scales([part[1:] for part in cut], firsts[-1], any_weight, grid, dtype)
    for i, first, grouped in cut:
        sums[i] += _loss(grouped, of_cut[first : first + len(grouped)].float(), grid)
    for own, table, scales in zip(batch, tables, of_cut.split(numbers), strict=True):
        # on one rank, since tables are added up
        if sharding.shard_index(any_weight) == 0 and scales.numel():
            by_period = scales.view(-1, own.stored.groups_per_period)
            table.view(-1, own.stored.groups_per_period)[own.cut_periods] = by_period
    return _added_up(tables, any_weight), group_sum(sums, any_weight).tolist()


def _added_up(tables: list[Tensor], any_weight: nn.Parameter) -> list[Tensor]:
    """Return the sum over the ranks of a layer's tables, in which each has filled its scales. Collective."""
    if sharding.num_shards(any_weight) == 1:
        return tables
    # Each scale is 0 on all ranks but one, so the sum of its bits as integers is exact.
    bits = torch.cat([table.view(torch.int16).flatten() for table in tables]).int()
    bits = group_sum(bits, any_weight, owners=True)
    values = bits.to(torch.int16).view(SCALE_DTYPE)
    added: list[Tensor] = []
    for table in tables:
        added.append(values[: table.numel()].view(table.shape))
        values = values[table.numel() :]
    return added


def _loss(grouped: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Return (squared error, sum of squares) of ``grouped`` quantised with the scales of its rows, (2,) float64."""
    errors, squares = group_losses(grouped, scales, grid)
    return torch.stack([errors.sum(), squares.sum()]).cpu()


def _cut_group_scales(
    parts: Sequence[tuple[int, Tensor]], total: int, any_weight: nn.Parameter, grid: Grid, dtype: torch.dtype
) -> Tensor:
    """Return the scales of ``total`` groups, from this rank's (first group, part of groups as rows). Collective."""
    device = sharding.shard_of(any_weight).values.device
    if not total:
        return torch.empty(0, dtype=SCALE_DTYPE, device=device)
    # numbers of the groups, and this rank's part of them as rows
    finite: list[tuple[slice, Tensor]] = []
    for first, grouped in parts:
        finite.append((slice(first, first + len(grouped)), _finite(grouped)))
    # the largest weights, and the largest of -w: one exchange of maxima gives both ends
    ends = torch.zeros(2, total, device=device)
    for at, grouped in finite:
        ends[:, at] = torch.maximum(ends[:, at], torch.stack([grouped.amax(1), -grouped.amin(1)]))
    ends = group_max(ends, any_weight, owners=True)
    extremes = larger_end(-ends[1], ends[0])
    wholes = [whole_weights(grouped, extremes[at]) for at, grouped in finite]

    def moments(scales: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.zeros(2, scales.numel(), dtype=torch.float64, device=scales.device)
        for (at, grouped), whole in zip(finite, wholes, strict=True):
            for kind, values in zip(both, group_moments(grouped, whole, scales[at], grid), strict=True):
                kind[at] += values
        by_weight, by_code = group_sum(both, any_weight, owners=True)
        return by_weight, by_code

    return search_scales(extremes, moments, grid, dtype)


def _finite(grouped: Tensor) -> Tensor:
    """Return ``grouped`` with 0 for NaN and infinity: all ranks must end the search, whose losses then say what is
    wrong."""
    return torch.nan_to_num(grouped, 0.0, 0.0, 0.0)
