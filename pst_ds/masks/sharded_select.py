"""Select the weights that each matrix keeps, for all layers at once, from the shards of all ranks."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

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
        count = prune_count(self.sparsity, self.layer.layout.in_features) if self.kind == "row" else 0
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
    ranks, device = rank_sums(any_weight), sharding.shard_of(any_weight).values.device
    by_itself = [m for m in matrices if not m.competes]
    whole = [m for m in matrices if m.competes and m.is_selected_there]
    cut = [m for m in matrices if m.competes and not m.is_selected_there]
    shared, owned = [m for m in cut if not m.is_of_owners], [m for m in cut if m.is_of_owners]
    found: dict[int, Kept] = {**_select_whole(whole, any_weight, device), **_select_owned(owned, any_weight, device)}
    if shared:
        with _naming(shared):
            found.update(zip(map(id, shared), _select(shared, ranks, device), strict=True))
    if by_itself:
        found.update(zip(map(id, by_itself), _each_unit_by_itself(by_itself, any_weight), strict=True))
    groups = {id(m): own for m in matrices if m.kind == "n:m" and m.selects_units and (own := m.unit_weights)}
    if groups:
        free = [bits for i in groups if isinstance(bits := found[i], Tensor)]
        found.update(zip(groups, keep_n_of_m(list(groups.values()), free)[0], strict=True))
    return [found[id(m)] for m in matrices]


def _select_whole(matrices: Sequence[Matrix], any_weight: nn.Parameter, device: torch.device) -> dict[int, Tensor]:
    """Return the kept bits, by id, of the matrices that lie in this rank's shard. Collective: one exchange."""
    found, not_finite = {}, torch.zeros(len(matrices), dtype=torch.int64)
    in_passes = []
    for i, m in enumerate(matrices):
        if m.layer.num_units(m.stored) == 0:
            found[id(m)] = torch.empty(0, dtype=torch.uint8, device=device)
        elif device.type == "cpu" and m.stored.rect.numel <= MOST_AT_ONCE:
            found[id(m)], not_finite[i] = kept_bits(_all_keys(m), _prune_count(m))
        else:
            in_passes.append(i)
    try:
        passed = _select([matrices[i] for i in in_passes], RankSums(), device)
        found.update({id(matrices[i]): bits for i, bits in zip(in_passes, passed, strict=True)})
    except NonFiniteScoreError as error:
        not_finite[[in_passes[i] for i in error.matrices]] = 1
    _raise_on_all_ranks(matrices, not_finite, any_weight, device)
    return found


def _raise_on_all_ranks(
    matrices: Sequence[Matrix], not_finite: Tensor, any_weight: nn.Parameter, device: torch.device
) -> None:
    """Raise FloatingPointError on every rank if one has marked matrices in ``not_finite``. Collective: one exchange."""
    if matrices:
        with _naming(matrices):
            if bad := group_sum(not_finite.to(device), any_weight).cpu().nonzero().flatten().tolist():
                raise NonFiniteScoreError(bad)


def _select_owned(matrices: Sequence[Matrix], any_weight: nn.Parameter, device: torch.device) -> dict[int, Tensor]:
    """Return the kept bits, by id, of matrices that the owners of their experts select together. Collective."""
    found = {id(m): torch.empty(0, dtype=torch.uint8, device=device) for m in matrices}
    own, not_finite = [i for i, m in enumerate(matrices) if not m.layer.is_elsewhere], torch.zeros(len(matrices))
    try:
        mine = [matrices[i] for i in own]
        ranks = rank_sums(mine[0].layer.layer.pst_mask, owners=True) if mine else RankSums()
        found.update(zip(map(id, mine), _select(mine, ranks, device), strict=True))
    except NonFiniteScoreError as error:
        not_finite[[own[i] for i in error.matrices]] = 1
    _raise_on_all_ranks(matrices, not_finite, any_weight, device)
    return found


def _select(matrices: Sequence[Matrix], ranks: RankSums, device: torch.device) -> list[Tensor]:
    """Return the kept bits of each matrix on this rank. Collective if ``ranks`` is. Raises NonFiniteScoreError."""
    found: dict[int, Tensor] = {}
    single = [i for i, m in enumerate(matrices) if not m.selects_units]
    wide = [i for i, m in enumerate(matrices) if m.selects_units]
    if single:
        keys, pools = _single_weights([matrices[i] for i in single])
        with _numbered(single):
            found.update(zip(single, select_bits(keys, ranks, device, pools), strict=True))
    own = {i: weights for i in wide if (weights := matrices[i].unit_weights)}
    if own:
        keys = [
            _by_kernels(matrices[i], own[i], tile) for i, tile in zip(own, unit_keys(list(own.values())), strict=True)
        ]
        with _numbered(list(own)):
            found.update(zip(own, select_bits(keys, ranks, device), strict=True))
    if wide := [i for i in wide if i not in own]:
        with _numbered(wide):
            cuts = select([_units(matrices[i]) for i in wide], ranks, device)
        found.update({i: _unit_bits(matrices[i], cut) for i, cut in zip(wide, cuts, strict=True)})
    return [found[i] for i in range(len(matrices))]


def weights_kept(matrix: Matrix, bits: Tensor) -> Iterator[tuple[Rect, Tensor]]:
    """Yield (rectangle, its mask (rows, cols) uint8) of a matrix on this rank, from the bits of :func:`select_kept`."""
    layer = matrix.layer
    per_unit = math.prod(layer.unit) if matrix.selects_units else 1
    flags = unpack_shard(bits, sum(rect.numel for rect in layer.rects(matrix.stored)) // per_unit)
    at = 0
    for rect in layer.rects(matrix.stored):
        count = rect.numel // per_unit
        own = flags[at : at + count]
        at += count
        if not matrix.selects_units:
            yield rect, own.view(rect.shape)
            continue
        kept = units.expand_units(own, rect, layer.unit)
        if matrix.kind == "n:m":  # a constrained group keeps its best
            kept = kept | units.keep_n_of_m(layer.keys(matrix.stored, rect), layer.unit, matrix.prune_per_group)
        yield rect, kept


def as_run(matrix: Matrix, bits: Kept) -> MatrixBits | None:
    """Return the bits of :func:`select_kept` for the kernel that puts them in place; None if it does not serve them."""
    if isinstance(bits, MatrixBits):
        return bits
    layer, rect, length = matrix.layer, matrix.stored.rect, matrix.layer.row_length
    unit = layer.unit if matrix.kind == "block" else (1, 1)
    if (matrix.kind == "n:m" and matrix.selects_units) or layer.unit[0] > unit[0]:
        return None
    first = positions_before(rect, length, layer.region[0]) // math.prod(unit)
    return MatrixBits(bits, rect, length, unit, first)


def _single_weights(matrices: Sequence[Matrix]) -> tuple[list[MatrixKeys], list[int]]:
    """Return the keys of single weights, and the number to prune per pool: all "global", or a "stack" layer."""
    keys, pools = [], dict[object, int]()
    for m in matrices:
        numel, pool = m.stored.rect.numel, _pool(m)
        wanted = _prune_count(m)
        if pool is not None:
            pools[pool] = pools.get(pool, 0) + wanted
        keys.append(
            MatrixKeys(
                prune_count=wanted if pool is None else numel - math.ceil(m.layer.rule.min_kept_share * numel),
                tiles=partial(m.layer.weight_keys, m.stored),
                pool=None if pool is None else list(pools).index(pool),
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
    return m.kind if m.kind == "global" else m.layer.name


def _prune_count(m: Matrix) -> int:
    """Return the number of weights, or units, of a matrix to prune."""
    if not m.selects_units:
        return prune_count(m.sparsity, m.stored.rect.numel)
    share = m.sparsity if m.kind == "block" else m.sparsity / (m.layer.pattern.fixed_sparsity or 1.0)
    return prune_count(share, m.stored.rect.numel // math.prod(m.layer.unit))


def _all_keys(m: Matrix) -> Tensor:
    if not m.selects_units:
        return m.layer.keys(m.stored, m.stored.rect)
    return torch.cat(list(m.layer.unit_keys(m.stored, m.prune_per_group)))


def _units(m: Matrix) -> MatrixKeys:
    return MatrixKeys(
        prune_count=_prune_count(m),
        tiles=partial(m.layer.unit_keys, m.stored, m.prune_per_group),
        own=m.layer.own_units(m.stored),
        num_keys=m.layer.num_units(m.stored),
    )


def _by_kernels(m: Matrix, own: OwnKeys, keys: Tensor) -> MatrixKeys:
    """Return the ``keys`` of the units of ``own`` for selection by kernels."""
    assert own.units is not None
    made, total, start = _units(m), m.stored.rect.numel // math.prod(m.layer.unit), own.units.first
    assert made.own is not None
    counted = start + made.own[0], start + made.own[1]
    table = OwnKeys(keys, start, total, Rect(0, 1, 0, total), TileFactors(), counted=counted)
    return replace(made, num_keys=keys.numel(), num_in_all=total, own_keys=table)


def _unit_bits(m: Matrix, cut: Cut) -> Tensor:
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
    found, bad = dict[int, Kept](), dict[int, Tensor]()
    own = {i: weights for i, m in enumerate(matrices) if (weights := m.unit_weights)}
    for kind, keep in (("row", keep_in_rows), ("n:m", keep_n_of_m)):
        if some := [i for i in own if matrices[i].kind == kind]:
            kept, not_finite = keep([own[i] for i in some])
            found.update(zip(some, kept, strict=True))
            bad.update(zip(some, not_finite, strict=True))
    for i, m in enumerate(matrices):
        if i not in own:
            found[i], bad[i] = _each_unit_in_torch(m)
    with _naming(matrices):
        if (
            wrong := group_sum(torch.stack([bad[i] for i in range(len(matrices))]), any_weight)
            .cpu()
            .nonzero()
            .flatten()
            .tolist()
        ):
            raise NonFiniteScoreError(wrong)
    return [found[i] for i in range(len(matrices))]


def _each_unit_in_torch(m: Matrix) -> tuple[Tensor, Tensor]:
    """Return the kept bits of one of these matrices, and how many tiles have scores that are not finite."""
    rects = list(m.layer.rects(m.stored))
    keep = torch.empty(sum(rect.numel for rect in rects), dtype=torch.uint8, device=m.layer.device)
    at, not_finite = 0, torch.zeros((), dtype=torch.int64, device=m.layer.device)
    for rect in rects:
        keys = m.layer.keys(m.stored, rect)
        lowest, highest = keys.aminmax()
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
        raise NonFiniteScoreError([positions[i] for i in error.matrices]) from None


@contextmanager
def _naming(matrices: Sequence[Matrix]) -> Iterator[None]:
    try:
        yield
    except NonFiniteScoreError as error:
        names = dict.fromkeys(matrices[i].layer.name for i in error.matrices)
        raise FloatingPointError(
            f"importance scores of {', '.join(names)} are not finite. Lower the learning rate of the scores or "
            "updates, or resume from the last checkpoint"
        ) from None
