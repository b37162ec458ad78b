"""Exact selection of the smallest scores of many matrices at once, for scores that are distributed over ranks.

Scores are order-preserving 32-bit keys (:mod:`pst_ds.core.keys`). Counts of keys in 2048 bins, summed over ranks,
narrow an interval around the cut of every matrix until it contains one key. One exchange of tie counts then decides
equal keys: the first are pruned. Counts are integers, so the result is the same for every world size. A key may also
belong to a block or to a group of N:M instead of a single weight.

:func:`select` reads all keys in every pass. :mod:`pst_ds.core.bracket` reads them once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pst_ds.core.kernels.triton.table import OwnKeys
from pst_ds.core.keys import HIGHEST_FINITE, LOWEST_FINITE, SingleWeights, histogram

DIGIT_BITS = 11
_KEY_BITS = 32
_LOWEST_KEY = -(1 << (_KEY_BITS - 1))
_JOINED_AT_ONCE = 256
"""Matrices of pools whose counts are limited in one step."""


class NonFiniteScoreError(FloatingPointError):
    """Some scores are NaN or infinite. ``matrices``: their matrices' positions in the call."""

    def __init__(self, matrices: list[int]):
        super().__init__(f"non-finite importance scores in matrices {matrices}")
        self.matrices = matrices


@dataclass(frozen=True, slots=True)
class RankSums:
    """The two collectives that selection needs, for integer tensors of equal shape; by default of one rank."""

    all_sum: Callable[[Tensor], Tensor] = lambda counts: counts
    """Element-wise sum over ranks."""
    sum_of_lower_ranks: Callable[[Tensor], Tensor] = torch.zeros_like
    """Element-wise sum over the ranks below this one, whose keys come first."""


class Sampled(NamedTuple):
    """This rank's keys in a sample, (n,) int32, or the weights to compute them from, and their places in the sample."""

    places: slice | Tensor
    keys: Tensor | SingleWeights


@dataclass(frozen=True, slots=True)
class MatrixKeys:
    """The keys of one matrix on this rank, and how many keys of the whole matrix to prune."""

    prune_count: int
    """Keys to prune; in a pool, the most that may be pruned."""
    tiles: Callable[[], Iterator[Tensor]]
    """Iterator over int32 key tensors: this rank's keys in increasing order. Called once per pass."""
    pool: int | None = None
    """Number of the pool. Matrices of one pool share a threshold and a number of keys to prune."""
    own: tuple[int, int] | None = None
    """First and last + 1 of the keys that this rank counts, if ``tiles`` also has keys of its neighbours.

    All keys in ``tiles`` are decided here.
    """
    is_whole: bool = False
    """True if all keys of the matrix are on one rank. Equal on every rank."""
    num_keys: int = 0
    """Keys in ``tiles``. Required by :mod:`pst_ds.core.bracket` and if ``is_whole``."""
    num_in_all: int = 0
    """Keys of the whole matrix, over all ranks. Required by :mod:`pst_ds.core.bracket`."""
    sample: Callable[[Tensor, Tensor], Sampled] | None = None
    """Return this rank's part of a sample at these positions in the whole matrix, int64, on CPU and keys' device.

    Required by :mod:`pst_ds.core.bracket`.
    """
    own_keys: OwnKeys | None = None
    """Computes the keys of ``tiles`` and ``sample`` where GPU kernels are available, for :mod:`pst_ds.core.bracket`."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Prune the keys below ``threshold``, and the first ``ties`` of this rank's keys that equal it."""

    threshold: int
    ties: int | Tensor
    """On a GPU a tensor after the first keys, so that the host need not wait."""

    def keep(self, keys: Tensor) -> "tuple[Tensor, Cut]":
        """Return the bool mask of the kept among the next ``keys``, and the cut for the keys after them."""
        kept = keys > self.threshold
        equal = keys == self.threshold
        if keys.device.type != "cpu":
            # A running count of equal keys: the host need not wait for their number.
            number = equal.flatten().cumsum(0).view(keys.shape)
            ties_left = (self.ties - equal.sum()).clamp(min=0)
            return kept | (equal & (number > self.ties)), Cut(self.threshold, ties_left)
        num_equal = int(equal.sum())
        if num_equal > self.ties:
            # The first `ties` of the equal keys are pruned.
            stay = equal.flatten().nonzero().flatten()[self.ties :]
            kept.view(-1)[stay] = True
        return kept, Cut(self.threshold, max(0, self.ties - num_equal))

    def keep_all(self, keys: Iterable[Tensor]) -> list[Tensor]:
        """Return the uint8 masks of consecutive ``keys``."""
        cut = self
        masks: list[Tensor] = []
        for part in keys:
            kept, cut = cut.keep(part)
            masks.append(kept.to(torch.uint8))
        return masks


def prune_count(sparsity: float, numel: int) -> int:
    """Return floor(sparsity * numel) in double precision: how many weights of a matrix are pruned."""
    return math.floor(sparsity * numel)


class Search:
    """An interval of keys per matrix that contains its cut, narrowed by counts over all ranks.

    Ranks sum one row of counts per matrix. Matrices of a pool that are whole on some rank share one row: their counts,
    each limited to its ``prune_count``, are known where they are stored. The exchange thus does not grow with their
    number. Tensors are int64 on the CPU. Tensors of rows, (rows,), are equal on every rank; those named ``here`` are
    local to this rank.
    """

    def __init__(self, matrices: Sequence[MatrixKeys], pools: Sequence[int], low: Sequence[int], ranks: RankSums):
        """``low``: first key of each matrix's interval, one value per pool."""
        is_joined = [m.pool is not None and m.is_whole for m in matrices]
        # Rows of counts: first one for each matrix that is not joined, then one for each pool with joined matrices.
        num_alone = is_joined.count(False)
        next_row = 0
        row_of_pool: dict[int | None, int] = {}
        self._ranks = ranks
        self._matrices = matrices
        self._pools: list[int] = []
        self._rows: list[int] = []
        next_pool = len(pools)
        for m, joined in zip(matrices, is_joined, strict=True):
            if m.pool is None:  # the only member of another pool, numbered after those of the caller
                self._pools.append(next_pool)
                next_pool += 1
            else:
                self._pools.append(m.pool)
            if joined:
                self._rows.append(row_of_pool.setdefault(m.pool, num_alone + len(row_of_pool)))
            else:
                self._rows.append(next_row)
                next_row += 1
        num_rows = num_alone + len(row_of_pool)
        self._joined = [i for i, joined in enumerate(is_joined) if joined]
        self.present = [i for i, m in enumerate(matrices) if m.num_keys or not is_joined[i]]
        """Indices of the matrices whose keys this rank counts."""
        wanted = [*pools, *(m.prune_count for m in matrices if m.pool is None)]
        self.wanted = torch.tensor(wanted, dtype=torch.int64)
        self.low = torch.zeros(num_rows, dtype=torch.int64)
        self.pool_of = torch.zeros_like(self.low)
        self.low[self._rows] = torch.tensor(low)
        self.pool_of[self._rows] = torch.tensor(self._pools)
        most = torch.tensor([m.prune_count for m in matrices], dtype=torch.int64)
        self.most = torch.zeros_like(self.low).index_add_(0, torch.tensor(self._rows), most)
        self.below = torch.zeros_like(self.low)
        self.equal = torch.zeros_like(self.low)
        self._row_here = torch.tensor(self._rows)[self.present]
        self._most_here = most[self.present]
        joined_here = torch.tensor([is_joined[i] for i in self.present], dtype=torch.bool)
        self._alone_here = (~joined_here).nonzero().flatten()
        self._joined_here = joined_here.nonzero().flatten()
        self.below_here = torch.zeros_like(self._row_here)
        self.equal_here = torch.zeros_like(self._row_here)

    @property
    def thresholds(self) -> list[int]:
        """Return the first key of each matrix's interval."""
        return self.low[self._rows].tolist()

    @property
    def thresholds_here(self) -> list[int]:
        """Return the first key of the interval of each matrix in :attr:`present`."""
        return self.low[self._row_here].tolist()

    def added(self, here: Tensor) -> Tensor:
        """Sum ``here``, (present, columns), by rows: (rows, columns)."""
        return here.new_zeros(len(self.low), here.shape[1]).index_add_(0, self._row_here, here)

    def offered(self, here: Tensor) -> Tensor:
        """Sum counts ``here``, (present, columns) in increasing order of keys above ``below_here``, by rows.

        For matrices that share a row, only the keys that they may lose are counted.
        """
        rows = here.new_zeros(len(self.low), here.shape[1])
        rows[: len(self._alone_here)] = here[self._alone_here]
        for part in self._joined_here.split(_JOINED_AT_ONCE):  # a part at a time, to limit the memory of these tensors
            before = self.below_here[part].unsqueeze(1)
            most = self._most_here[part].unsqueeze(1)
            # Differences of limited cumulative counts: a count beyond the limit adds nothing.
            reached = torch.cat([before, here[part].cumsum(1) + before], 1).minimum(most)
            rows.index_add_(0, self._row_here[part], reached.diff(dim=1))
        return rows

    def exchange(self, there: Tensor, offered: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return counts, (present, columns) on any device, and the sum over ranks of what is ``offered`` of them, both
        on the CPU. Collective. The host waits for a device once if no matrices share a row: the rows are then theirs.
        """
        if self._joined or there.device.type == "cpu":
            here = there.cpu()
            return here, self._ranks.all_sum(offered(here))
        # Both in one copy from the device, so that the host waits once.
        here, summed = torch.stack([there, self._ranks.all_sum(there.clone())]).cpu()
        return here, summed

    def everywhere(self, here: Tensor) -> list[int]:
        """Return the indices of the matrices for which some rank has a positive ``here``, (present,). Collective."""
        of_matrix = torch.zeros(len(self._matrices), dtype=torch.int64)
        of_matrix[self.present] = here
        return self._ranks.all_sum(of_matrix).nonzero().flatten().tolist()

    def pruned_up_to(self, counts: Tensor) -> Tensor:
        """Return how many keys each pool prunes if its rows offer (rows, ...) ``counts``."""
        offered = torch.minimum(counts, self.most.view(-1, *(1,) * (counts.dim() - 1)))
        totals = offered.new_zeros(len(self.wanted), *counts.shape[1:])
        return totals.index_add_(0, self.pool_of, offered)

    def narrow(self, here: Tensor, counts: Tensor, shift: int) -> None:
        """Narrow every interval to the bin that contains the cut, for bins of 2**shift keys from low.

        ``here``: (present, bins) of this rank. ``counts``: (rows, bins) over all ranks, of what is :meth:`offered`.
        """
        cumulative = counts.cumsum(1) + self.below.unsqueeze(1)
        reached = self.pruned_up_to(cumulative) >= self.wanted.unsqueeze(1)
        # argmax finds the first bin that reaches the wanted number. A pool that wants more keys than it has ends in its
        # last bin.
        bins = torch.where(reached.any(1), reached.int().argmax(1), counts.shape[1] - 1)
        bin_of_row = bins[self.pool_of].unsqueeze(1)
        self.equal = counts.gather(1, bin_of_row).squeeze(1)
        self.below = cumulative.gather(1, bin_of_row).squeeze(1) - self.equal
        self.low = self.low + (bin_of_row.squeeze(1) << shift)
        bin_here = bin_of_row[self._row_here]
        self.equal_here = here.gather(1, bin_here).squeeze(1)
        self.below_here = self.below_here + here.cumsum(1).gather(1, bin_here).squeeze(1) - self.equal_here

    def cuts(self) -> list[Cut]:
        """Return the cut of each matrix for this rank's keys, once every interval has a single key. Collective.

        Equal keys of a pool are pruned in the order of its matrices, and within a matrix from the first.
        """
        rooms = torch.minimum(self.equal, self.most - self.below)[self._rows]
        if self._joined:  # equal on every rank, as a collective requires
            rooms_here = torch.zeros_like(rooms)
            rooms_here[self.present] = torch.minimum(self.equal_here, self._most_here - self.below_here).clamp(min=0)
            rooms[self._joined] = self._ranks.all_sum(rooms_here[self._joined])
        before = self._ranks.sum_of_lower_ranks(self.equal_here[self._alone_here]).tolist()
        left = (self.wanted - self.pruned_up_to(self.below)).tolist()
        cuts: list[Cut] = []
        for row, pool, room, key in zip(self._rows, self._pools, rooms.tolist(), self.thresholds, strict=True):
            ties = max(0, min(room, left[pool]))
            left[pool] -= ties
            # Lower ranks prune the first ties. Rows after ``before`` are of matrices that are whole on one rank.
            ties_before = 0
            if row < len(before):
                ties_before = before[row]
            cuts.append(Cut(key, ties - ties_before))
        return cuts

    def missed(self, inside: Tensor, overflowed: Tensor) -> set[int]:
        """Return the matrices, in whole pools, that overflowed or whose cut is not among the ``inside`` (rows,)."""
        below = self.pruned_up_to(self.below)
        holds = (below <= self.wanted) & (self.pruned_up_to(self.below + inside) >= self.wanted)
        flawed = torch.zeros_like(self.wanted).index_add_(0, self.pool_of, overflowed)
        bad = (~holds | (flawed > 0)).tolist()
        return {i for i, pool in enumerate(self._pools) if bad[pool]}

    def at_most(self) -> tuple[list[int], list[int]]:
        """Return the matrices that may not lose as many keys as their pool's cut asks: shared, and this rank's only."""
        beyond = (self.below > self.most).tolist()
        beyond_here = (self.below_here > self._most_here).tolist()
        joined = set(self._joined)
        shared = [i for i, row in enumerate(self._rows) if i not in joined and beyond[row]]
        here = [i for i, is_beyond in zip(self.present, beyond_here, strict=True) if is_beyond and i in joined]
        return shared, here


def select(
    matrices: Sequence[MatrixKeys],
    ranks: RankSums | None = None,
    device: torch.device | None = None,
    pools: Sequence[int] = (),
) -> list[Cut]:
    """Return the cuts that prune exactly ``prune_count`` keys of each matrix, or ``pools[i]`` of pool i.

    Collective if ``ranks`` is: four exchanges regardless of the number of matrices, five if some are whole on a rank,
    and as many again if matrices of a pool reach their maximum. Raises NonFiniteScoreError on every rank if any score
    on any rank is NaN or infinite.
    """
    ranks = ranks or RankSums()
    device = device or torch.device("cpu")
    search = Search(matrices, pools, [_LOWEST_KEY] * len(matrices), ranks)
    shift = _KEY_BITS
    while shift:
        digit_bits = min(DIGIT_BITS, shift)
        shift -= digit_bits
        there = torch.zeros(len(search.present), 1 << digit_bits, dtype=torch.int64, device=device)
        for i, first, out in zip(search.present, search.thresholds_here, there, strict=True):
            out.copy_(_counts(matrices[i], first, shift, 1 << digit_bits, device))
        here = there.cpu()  # the host waits for the device once per digit
        # NaN and infinity are recognised by the first digit.
        not_finite = here[:, :0]
        if shift == _KEY_BITS - DIGIT_BITS:
            not_finite = _not_finite(here)
        counts = ranks.all_sum(torch.cat([search.added(not_finite), search.offered(here)], 1))
        if counts[:, : not_finite.shape[1]].any():
            raise NonFiniteScoreError(search.everywhere(not_finite.squeeze(1)))
        search.narrow(here, counts[:, not_finite.shape[1] :], shift)
    cuts = [_from_the_first(cut, m) for cut, m in zip(search.cuts(), matrices, strict=True)]
    # First the matrices that all ranks share, in one collective call, then those that only this rank has.
    for at_most, sums in zip(search.at_most(), (ranks, RankSums()), strict=True):
        if not at_most:
            continue
        alone = [replace(matrices[i], pool=None) for i in at_most]
        for i, cut in zip(at_most, select(alone, sums, device), strict=True):
            cuts[i] = cut
    return cuts


def _from_the_first(cut: Cut, matrix: MatrixKeys) -> Cut:
    """Return the cut counted from the first key of the tiles, not from this rank's first."""
    equal = 0
    if matrix.own:
        # Keys of lower ranks that this rank decides too. Theirs come first, so the ties among them are pruned as well.
        for keys in _between(matrix, 0, matrix.own[0]):
            equal += int((keys == cut.threshold).sum())
    return Cut(cut.threshold, max(0, int(cut.ties) + equal))


def _between(matrix: MatrixKeys, first: int, last: int) -> Iterator[Tensor]:
    """Yield the keys at positions [first, last) of the tiles, flat."""
    if first >= last:
        return
    position = 0
    for keys in matrix.tiles():
        yield keys.flatten()[max(0, first - position) : max(0, last - position)]
        position += keys.numel()
        if position >= last:  # computing the keys of further tiles would be wasted
            break


def _counts(matrix: MatrixKeys, low: int, shift: int, bins: int, device: torch.device) -> Tensor:
    """Return the counts of the keys that this rank counts, in bins of 2**shift keys from ``low`` on: (bins,) int64."""
    counts = torch.zeros(bins, dtype=torch.int64, device=device)
    tiles = matrix.tiles() if matrix.own is None else _between(matrix, *matrix.own)
    for keys in tiles:
        counts += histogram(keys.flatten(), low, shift, bins)
    return counts


def _not_finite(counts: Tensor) -> Tensor:
    """Return how many of the first digit's ``counts``, (n, bins), belong to NaN and infinity: (n, 1).

    The first digit is the sign, the exponent and two more bits, so these are the bins at either end.
    """
    width = _KEY_BITS - DIGIT_BITS
    first = (LOWEST_FINITE - _LOWEST_KEY) >> width
    last = (HIGHEST_FINITE - _LOWEST_KEY) >> width
    return counts[:, :first].sum(1, keepdim=True) + counts[:, last + 1 :].sum(1, keepdim=True)
