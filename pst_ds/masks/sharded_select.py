"""Select the weights that each matrix keeps, for all layers at once, from the shards of all ranks."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from pst_ds.core import units
from pst_ds.core.bits import pack_shard, unpack_shard
from pst_ds.core.bracket import select_bits
from pst_ds.core.factors import TileFactors
from pst_ds.core.kernels.triton.bit_sums import MatrixBits
from pst_ds.core.kernels.triton.table import OwnKeys
from pst_ds.core.kernels.triton.unit_masks import keep_in_rows, keep_n_of_m, unit_keys
from pst_ds.core.keys import HIGHEST_FINITE, LOWEST_FINITE, MOST_AT_ONCE, kept_bits
from pst_ds.core.layout import Rect, StoredMatrix, positions_before
from pst_ds.core.select import Cut, MatrixKeys, NonFiniteScoreError, RankSums, prune_count, select
from pst_ds.masks.layer_scores import LayerScores
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import group_sum, rank_sums

T = TypeVar("T")
Kept = Tensor | MatrixBits
"""Kept bits of a matrix on this rank: a tensor of its units' bits if it ``selects_units``, else of its weights'.
Kernels return the bits of weights, as MatrixBits."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a layer, and its current sparsity."""

    layer: LayerScores
    stored: StoredMatrix
    sparsity: float

    @property
    def kind(self) -> str:
        return self.layer.pattern.kind

    @property
    def prune_per_group(self) -> int:
        """Weights pruned of each constrained group of N:M; 0 for other patterns."""
        return self.layer.pattern.m - self.layer.pattern.n

    @property
    def selects_units(self) -> bool:
        """True if units of several weights are ranked: blocks, or N:M groups if only a share is constrained."""
        if self.kind == "n:m":
            return self.sparsity != self.layer.pattern.fixed_sparsity
        return self.kind == "block"

    @property
    def unit_weights(self) -> OwnKeys | None:
        """Return what the kernels of units read; None if they do not serve its units."""
        count = 0
        if self.kind == "row":
            count = prune_count(self.sparsity, self.layer.layout.in_features)
        return self.layer.unit_weights(self.stored, self.prune_per_group, count)

    @property
    def competes(self) -> bool:
        """True if units compete across the matrix; False if each row or group is decided separately."""
        return self.kind == "matrix" or self.layer.pattern.pools_matrices or self.selects_units

    @property
    def lies_whole(self) -> bool:
        """True if one rank's shard has all its weights. The same on every rank."""
        return self.layer.lies_whole(self.stored)

    @property
    def is_of_owners(self) -> bool:
        """True if the ranks that own its experts select it, without others. The same on every rank."""
        return self.layer.layer.group is not None and not self.layer.pattern.pools_matrices

    @property
    def is_selected_there(self) -> bool:
        """True if one rank can select it from its weights. The same on every rank."""
        return self.lies_whole and not self.layer.pattern.pools_matrices


def select_kept(matrices: Sequence[Matrix], any_weight: nn.Parameter) -> list[Kept]:
    """Return the bits kept of every matrix on this rank.

    A matrix that lies in one rank's shard is selected there, or counted there with others of its pool. For matrices cut
    by a shard boundary, counts are exchanged. Collective, with a number of exchanges that does not depend on the number
    of matrices. Raises FloatingPointError on every rank, naming the layers, for scores that are not finite.
    """
    ranks = rank_sums(any_weight)
    device = sharding.shard_of(any_weight).values.device
    separate: list[Matrix] = []
    whole: list[Matrix] = []
    owned: list[Matrix] = []
    shared: list[Matrix] = []
    for m in matrices:
        if not m.competes:
            separate.append(m)
        elif m.is_selected_there:
            whole.append(m)
        elif m.is_of_owners:
            owned.append(m)
        else:
            shared.append(m)
    # Each call exchanges counts. The four lists are the same on every rank, so all ranks make the calls in this order.
    kept: dict[int, Kept] = {}
    kept.update(_select_whole(whole, any_weight, device))
    kept.update(_select_owned(owned, any_weight, device))
    if shared:
        with _naming(shared):
            kept.update(zip(map(id, shared), _select(shared, ranks, device), strict=True))
    if separate:
        kept.update(zip(map(id, separate), _each_unit_by_itself(separate, any_weight), strict=True))
    _prune_in_groups(matrices, kept)
    return [kept[id(m)] for m in matrices]


def _prune_in_groups(matrices: Sequence[Matrix], kept: dict[int, Kept]) -> None:
    """Replace bits of N:M groups by bits of weights in ``kept``, by id, for the matrices that kernels serve."""
    groups: dict[int, OwnKeys] = {}
    unconstrained: list[Tensor] = []
    for m in matrices:
        if m.kind != "n:m" or not m.selects_units:
            continue
        weights = m.unit_weights
        if not weights:
            continue
        groups[id(m)] = weights
        bits = kept[id(m)]
        if isinstance(bits, Tensor):
            unconstrained.append(bits)
    if groups:
        # Scores were checked when the groups were ranked.
        masks, _ = keep_n_of_m(list(groups.values()), unconstrained)
        kept.update(zip(groups, masks, strict=True))


def _select_whole(matrices: Sequence[Matrix], any_weight: nn.Parameter, device: torch.device) -> dict[int, Tensor]:
    """Return the kept bits, by id, of the matrices that lie in this rank's shard. Collective: one exchange."""
    kept: dict[int, Tensor] = {}
    not_finite = torch.zeros(len(matrices), dtype=torch.int64)
    in_passes: list[int] = []
    for i, m in enumerate(matrices):
        if m.layer.num_units(m.stored) == 0:
            kept[id(m)] = torch.empty(0, dtype=torch.uint8, device=device)
        elif device.type == "cpu" and m.stored.rect.numel <= MOST_AT_ONCE:
            kept[id(m)], not_finite[i] = kept_bits(_all_keys(m), _prune_count(m))
        else:
            in_passes.append(i)
    # An error of this rank must not skip the exchange that the other ranks take part in.
    try:
        # sums over this rank only: the other ranks have no weights of these matrices
        selected = _select(_at(matrices, in_passes), RankSums(), device)
        for i, bits in zip(in_passes, selected, strict=True):
            kept[id(matrices[i])] = bits
    except NonFiniteScoreError as error:
        not_finite[_at(in_passes, error.matrices)] = 1
    _raise_on_all_ranks(matrices, not_finite, any_weight, device)
    return kept


def _raise_on_all_ranks(
    matrices: Sequence[Matrix], not_finite: Tensor, any_weight: nn.Parameter, device: torch.device
) -> None:
    """Raise FloatingPointError on every rank if one has marked matrices in ``not_finite``. Collective: one exchange."""
    if matrices:
        with _naming(matrices):
            marks = group_sum(not_finite.to(device), any_weight).cpu()
            marked = marks.nonzero().flatten().tolist()
            if marked:
                raise NonFiniteScoreError(marked)


def _select_owned(matrices: Sequence[Matrix], any_weight: nn.Parameter, device: torch.device) -> dict[int, Tensor]:
    """Return the kept bits, by id, of matrices that the owners of their experts select together. Collective."""
    kept: dict[int, Tensor] = {}
    positions: list[int] = []
    for i, m in enumerate(matrices):
        # no bits of the experts that other ranks own
        kept[id(m)] = torch.empty(0, dtype=torch.uint8, device=device)
        if not m.layer.is_elsewhere:
            positions.append(i)
    not_finite = torch.zeros(len(matrices))
    try:
        here = _at(matrices, positions)
        ranks = RankSums()
        if here:
            ranks = rank_sums(here[0].layer.layer.pst_mask, owners=True)
        kept.update(zip(map(id, here), _select(here, ranks, device), strict=True))
    except NonFiniteScoreError as error:
        not_finite[_at(positions, error.matrices)] = 1
    # All ranks take part, also those that own other experts, so that all stop.
    _raise_on_all_ranks(matrices, not_finite, any_weight, device)
    return kept


def _select(matrices: Sequence[Matrix], ranks: RankSums, device: torch.device) -> list[Tensor]:
    """Return the kept bits of each matrix on this rank. Collective if ``ranks`` is. Raises NonFiniteScoreError."""
    kept: dict[int, Tensor] = {}
    single: list[int] = []
    by_kernels: dict[int, OwnKeys] = {}
    in_torch: list[int] = []
    for i, m in enumerate(matrices):
        if not m.selects_units:
            single.append(i)
            continue
        weights = m.unit_weights
        if weights:
            by_kernels[i] = weights
        else:
            in_torch.append(i)
    # The order of the three searches is the order of their exchanges.
    if single:
        keys, pools = _single_weights(_at(matrices, single))
        with _numbered(single):
            kept.update(zip(single, select_bits(keys, ranks, device, pools), strict=True))
    if by_kernels:
        tables: list[MatrixKeys] = []
        for (i, weights), tile in zip(by_kernels.items(), unit_keys(list(by_kernels.values())), strict=True):
            tables.append(_by_kernels(matrices[i], weights, tile))
        with _numbered(list(by_kernels)):
            kept.update(zip(by_kernels, select_bits(tables, ranks, device), strict=True))
    if in_torch:
        with _numbered(in_torch):
            cuts = select(list(map(_units, _at(matrices, in_torch))), ranks, device)
        for i, cut in zip(in_torch, cuts, strict=True):
            kept[i] = _unit_bits(matrices[i], cut)
    return [kept[i] for i in range(len(matrices))]


def weights_kept(matrix: Matrix, bits: Tensor) -> Iterator[tuple[Rect, Tensor]]:
    """Yield (rectangle, its mask (rows, cols) uint8) of a matrix on this rank, from the bits of :func:`select_kept`."""
    layer = matrix.layer
    per_unit = 1
    if matrix.selects_units:
        per_unit = math.prod(layer.unit)
    rects = list(layer.rects(matrix.stored))
    flags = unpack_shard(bits, sum(rect.numel for rect in rects) // per_unit)
    at = 0
    for rect in rects:
        count = rect.numel // per_unit
        flags_of_rect = flags[at : at + count]
        at += count
        if not matrix.selects_units:
            yield rect, flags_of_rect.view(rect.shape)
            continue
        kept = units.expand_units(flags_of_rect, rect, layer.unit)
        # a constrained group keeps its best
        if matrix.kind == "n:m":
            kept = kept | units.keep_n_of_m(layer.keys(matrix.stored, rect), layer.unit, matrix.prune_per_group)
        yield rect, kept


def as_run(matrix: Matrix, bits: Kept) -> MatrixBits | None:
    """Return the bits of :func:`select_kept` for the kernel that puts them in place; None if it does not serve them."""
    if isinstance(bits, MatrixBits):
        return bits
    layer = matrix.layer
    rect = matrix.stored.rect
    length = layer.row_length
    # rows and columns that one bit stands for
    unit = (1, 1)
    if matrix.kind == "block":
        unit = layer.unit
    # groups have bits of weights only after their best were chosen, and a taller unit spans rows of the storage
    if (matrix.kind == "n:m" and matrix.selects_units) or layer.unit[0] > unit[0]:
        return None
    first = positions_before(rect, length, layer.region[0]) // math.prod(unit)
    return MatrixBits(bits, rect, length, unit, first)


def _single_weights(matrices: Sequence[Matrix]) -> tuple[list[MatrixKeys], list[int]]:
    """Return the keys of single weights, and the number to prune per pool: all "global", or a "stack" layer."""
    keys: list[MatrixKeys] = []
    pools: dict[object, int] = {}
    for m in matrices:
        numel = m.stored.rect.numel
        pool = _pool(m)
        pool_index = None
        count = _prune_count(m)
        if pool is not None:
            pools[pool] = pools.get(pool, 0) + count
            pool_index = list(pools).index(pool)
            # The pool decides how many weights the matrix loses, up to this limit.
            count = numel - math.ceil(m.layer.rule.min_kept_share * numel)
        keys.append(
            MatrixKeys(
                prune_count=count,
                tiles=partial(m.layer.weight_keys, m.stored),
                pool=pool_index,
                is_whole=m.lies_whole,
                num_keys=m.layer.num_units(m.stored),
                num_in_all=numel,
                sample=partial(m.layer.sample, m.stored),
                own_keys=m.layer.own_keys(m.stored),
            )
        )
    return keys, list(pools.values())


def _pool(m: Matrix) -> object | None:
    """Return the key shared by the matrices that are ranked together; None for a matrix ranked separately."""
    if not m.layer.pattern.pools_matrices:
        return None
    if m.kind == "global":
        return m.kind
    # "stack": the matrices of one layer
    return m.layer.name


def _prune_count(m: Matrix) -> int:
    """Return the number of weights, or units, of a matrix to prune."""
    if not m.selects_units:
        return prune_count(m.sparsity, m.stored.rect.numel)
    share = m.sparsity
    if m.kind == "n:m":
        # a constrained group loses this fraction of its weights
        share /= m.layer.pattern.fixed_sparsity or 1.0
    return prune_count(share, m.stored.rect.numel // math.prod(m.layer.unit))


def _all_keys(m: Matrix) -> Tensor:
    """Return the keys of all units of a matrix on this rank at once."""
    if not m.selects_units:
        return m.layer.keys(m.stored, m.stored.rect)
    return torch.cat(list(m.layer.unit_keys(m.stored, m.prune_per_group)))


def _units(m: Matrix) -> MatrixKeys:
    """Return the keys of the units of a matrix on this rank, computed tile by tile."""
    return MatrixKeys(
        prune_count=_prune_count(m),
        tiles=partial(m.layer.unit_keys, m.stored, m.prune_per_group),
        own=m.layer.own_units(m.stored),
        num_keys=m.layer.num_units(m.stored),
    )


def _by_kernels(m: Matrix, own: OwnKeys, keys: Tensor) -> MatrixKeys:
    """Return the ``keys`` of the units of ``own`` for selection by kernels."""
    assert own.units is not None
    in_units = _units(m)
    total = m.stored.rect.numel // math.prod(m.layer.unit)
    start = own.units.first
    assert in_units.own is not None
    first, end = in_units.own
    # To the kernels, the keys of all units are a matrix of one row.
    table = OwnKeys(keys, start, total, Rect(0, 1, 0, total), TileFactors(), counted=(start + first, start + end))
    return replace(in_units, num_keys=keys.numel(), num_in_all=total, own_keys=table)


def _unit_bits(m: Matrix, cut: Cut) -> Tensor:
    """Return the packed bits of the units of a matrix, of which ``cut`` says which are kept."""
    keys = _units(m)
    keep = torch.empty(keys.num_keys, dtype=torch.uint8, device=m.layer.device)
    at = 0
    for tile in keys.tiles():
        kept, cut = cut.keep(tile)
        keep[at : at + kept.numel()] = kept
        at += kept.numel()
    return pack_shard(keep, -(-keys.num_keys // 8))


def _each_unit_by_itself(matrices: Sequence[Matrix], any_weight: nn.Parameter) -> list[Kept]:
    """Return the kept bits of matrices whose rows, or N:M groups, are decided separately. Collective."""
    kept: dict[int, Kept] = {}
    not_finite: dict[int, Tensor] = {}
    by_kernels: dict[int, OwnKeys] = {}
    for i, m in enumerate(matrices):
        weights = m.unit_weights
        if weights:
            by_kernels[i] = weights
    for kind, keep in (("row", keep_in_rows), ("n:m", keep_n_of_m)):
        of_kind = [i for i in by_kernels if matrices[i].kind == kind]
        if of_kind:
            # one launch for all matrices of a kind
            masks, marks = keep([by_kernels[i] for i in of_kind])
            kept.update(zip(of_kind, masks, strict=True))
            not_finite.update(zip(of_kind, marks, strict=True))
    for i, m in enumerate(matrices):
        if i not in by_kernels:
            kept[i], not_finite[i] = _each_unit_in_torch(m)
    marks_in_order = torch.stack([not_finite[i] for i in range(len(matrices))])
    _raise_on_all_ranks(matrices, marks_in_order, any_weight, marks_in_order.device)
    return [kept[i] for i in range(len(matrices))]


def _each_unit_in_torch(m: Matrix) -> tuple[Tensor, Tensor]:
    """Return the kept bits of one of these matrices, and how many tiles have scores that are not finite."""
    rects = list(m.layer.rects(m.stored))
    keep = torch.empty(sum(rect.numel for rect in rects), dtype=torch.uint8, device=m.layer.device)
    at = 0
    # Stays on the device, so that no tile waits for the host.
    not_finite = torch.zeros((), dtype=torch.int64, device=m.layer.device)
    for rect in rects:
        keys = m.layer.keys(m.stored, rect)
        lowest, highest = keys.aminmax()
        # keys order scores, so that NaN and infinity lie outside of these ends
        not_finite += (lowest < LOWEST_FINITE) | (highest > HIGHEST_FINITE)
        if m.kind == "row":
            kept = units.keep_in_rows(keys, m.layer.unit, prune_count(m.sparsity, m.layer.layout.in_features))
        else:
            kept = units.keep_n_of_m(keys, m.layer.unit, m.prune_per_group)
        keep[at : at + rect.numel] = kept.reshape(-1)
        at += rect.numel
    return pack_shard(keep, -(-keep.numel() // 8)), not_finite


@contextmanager
def _numbered(positions: Sequence[int]) -> Iterator[None]:
    """Translate the matrix numbers of an error to ``positions`` in a longer list."""
    try:
        yield
    except NonFiniteScoreError as error:
        raise NonFiniteScoreError(_at(positions, error.matrices)) from None


def _at(items: Sequence[T], positions: Sequence[int]) -> list[T]:
    """Return the ``items`` at some positions."""
    return [items[position] for position in positions]


@contextmanager
def _naming(matrices: Sequence[Matrix]) -> Iterator[None]:
    """Turn the numbers of an error into a FloatingPointError with the names of the layers."""
    try:
        yield
    except NonFiniteScoreError as error:
        # a layer may have several matrices
        names = dict.fromkeys(m.layer.name for m in _at(matrices, error.matrices))
        raise FloatingPointError(
            f"importance scores of {', '.join(names)} are not finite. Lower the learning rate of the scores or "
            "updates, or resume from the last checkpoint"
        ) from None
