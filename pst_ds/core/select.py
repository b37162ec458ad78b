"""Exact selection of the smallest scores of many matrices at once, over scores that lie on many ranks.

Scores are order-preserving 32-bit keys (:mod:`pst_ds.core.keys`). Counts of keys in 2048 bins, summed over ranks,
narrow an interval around the cut of every matrix until one key is left; one exchange of tie counts settles equals: the
first are pruned. Counts are integers, so the result is the same for every world size. What is selected need not be
single weights: a block, or a group of N:M, has one key too.

:func:`select` reads all keys once a pass. :mod:`pst_ds.core.bracket` reads them once in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pst_ds.core.kernels.own_keys import OwnKeys
from pst_ds.core.keys import HIGHEST_FINITE, LOWEST_FINITE, histogram, order_keys

DIGIT_BITS = 11
_KEY_BITS = 32
_LOWEST_KEY = -(1 << (_KEY_BITS - 1))


class NonFiniteScoreError(FloatingPointError):
    """Some scores are NaN or infinite; ``matrices`` has the positions of theirs in the call."""

    def __init__(self, matrices: list[int]):
        super().__init__(f"non-finite importance scores in matrices {matrices}")
        self.matrices = matrices


def _unchanged(counts: Tensor) -> Tensor:
    return counts


@dataclass(frozen=True, slots=True)
class RankSums:
    """The two collectives selection needs, on integer tensors of equal shape on every rank.

    The defaults are for scores that lie whole on one rank.
    """

    all_sum: Callable[[Tensor], Tensor] = _unchanged
    """Element-wise sum over ranks."""
    sum_of_lower_ranks: Callable[[Tensor], Tensor] = torch.zeros_like
    """Element-wise sum over the ranks below this one, whose keys come first."""


@dataclass(frozen=True, slots=True)
class MatrixKeys:
    """The keys of one matrix on this rank, and how many of the whole matrix to prune."""

    prune_count: int
    """Exactly so many; in a pool, at most so many."""
    tiles: Callable[[], Iterator[Tensor]]
    """Called once a pass: int32 key tensors, together this rank's keys in rising order."""
    pool: int | None = None
    """Matrices of one pool share a threshold and a number of keys to prune."""
    own: tuple[int, int] | None = None
    """First and last + 1 of the keys that are this rank's to count, when ``tiles`` has keys of its neighbours' before
    and after them, to be decided here too."""
    num_keys: int = 0
    """Keys in ``tiles``; for :mod:`pst_ds.core.bracket`."""
    num_in_all: int = 0
    """Keys of the whole matrix, over all ranks; for :mod:`pst_ds.core.bracket`."""
    sample: Callable[[Tensor, Tensor], Tensor] | None = None
    """Keys at the given positions (int64, among the whole matrix's), 0 where another rank has them; for
    :mod:`pst_ds.core.bracket`. The positions come twice, on the CPU and on the keys' device."""
    own_keys: OwnKeys | None = None
    """What makes the keys of ``tiles`` and ``sample`` where kernels serve; for :mod:`pst_ds.core.bracket`."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Prune the keys below ``threshold``, and the first ``ties`` of this rank's that equal it."""

    threshold: int
    ties: int | Tensor
    """Off the CPU a tensor once some keys have been seen, which the host need not wait for."""

    def keep(self, keys: Tensor) -> tuple[Tensor, Cut]:
        """(mask of the kept among the next ``keys``, bool of their shape; the cut for the keys after these)."""
        kept = keys > self.threshold
        equal = keys == self.threshold
        if keys.device.type != "cpu":
            number = equal.flatten().cumsum(0).view(keys.shape)
            return kept | (equal & (number > self.ties)), Cut(self.threshold, (self.ties - equal.sum()).clamp(min=0))
        num_equal = int(equal.sum())
        if num_equal > self.ties:
            # The first `ties` of the equals go, the rest stays.
            stay = equal.flatten().nonzero().flatten()[self.ties :]
            kept.view(-1)[stay] = True
        return kept, Cut(self.threshold, max(0, self.ties - num_equal))


def prune_count(sparsity: float, numel: int) -> int:
    """floor(sparsity * numel), in double precision: how many weights of a matrix are zero."""
    return math.floor(sparsity * numel)


class Search:
    """An interval of keys for every matrix that holds its cut, narrowed by counts over all ranks.

    Pure bookkeeping on (num matrices,) int64 tensors, equal on every rank; it does no communication.
    """

    def __init__(self, matrices: Sequence[MatrixKeys], pools: Sequence[int], low: Tensor, below: Tensor):
        """``low``: first key of each interval, one value within a pool; ``below``: how many keys are under it."""
        device = low.device
        next_pool = iter(range(len(pools), len(pools) + len(matrices)))
        pool_of = [next(next_pool) if m.pool is None else m.pool for m in matrices]
        wanted = [*pools, *(m.prune_count for m in matrices if m.pool is None)]
        self.most = torch.tensor([m.prune_count for m in matrices], dtype=torch.int64, device=device)
        self.pool_of = torch.tensor(pool_of, dtype=torch.int64, device=device)
        self.wanted = torch.tensor(wanted, dtype=torch.int64, device=device)
        self.low, self.below = low, below
        self.equal = torch.zeros_like(low)

    def pruned_up_to(self, counts: Tensor) -> Tensor:
        """Over the pools: how many are pruned when each matrix offers (num matrices, ...) ``counts``."""
        offered = torch.minimum(counts, self.most.view(-1, *(1,) * (counts.dim() - 1)))
        totals = offered.new_zeros(len(self.wanted), *counts.shape[1:])
        return totals.index_add_(0, self.pool_of, offered)

    def narrow(self, counts: Tensor, shift: int) -> Tensor:
        """Go to the bin with the cut: ``counts`` (num matrices, bins) over all ranks, bins of 2**shift keys from low.

        Returns the bin of every matrix, (num matrices,).
        """
        cumulative = counts.cumsum(1) + self.below.unsqueeze(1)
        reached = self.pruned_up_to(cumulative) >= self.wanted.unsqueeze(1)
        bins = torch.where(reached.any(1), reached.int().argmax(1), counts.shape[1] - 1)
        own = bins[self.pool_of].unsqueeze(1)
        self.equal = counts.gather(1, own).squeeze(1)
        self.below = cumulative.gather(1, own).squeeze(1) - self.equal
        self.low = self.low + (own.squeeze(1) << shift)
        return own.squeeze(1)

    def ties(self) -> tuple[list[int], list[int]]:
        """Once the intervals hold one key: (how many equals of each matrix are pruned; matrices at their most).

        A pool's equals are pruned in the order of its matrices. A matrix at its most has its cut below the pool's.
        """
        below, equal, most = self.below.tolist(), self.equal.tolist(), self.most.tolist()
        left = (self.wanted - self.pruned_up_to(self.below)).tolist()
        ties = []
        for i, pool in enumerate(self.pool_of.tolist()):
            ties.append(max(0, min(equal[i], most[i] - below[i], left[pool])))
            left[pool] -= ties[-1]
        return ties, [i for i in range(len(most)) if below[i] > most[i]]


def select(
    matrices: Sequence[MatrixKeys],
    ranks: RankSums | None = None,
    device: torch.device | None = None,
    pools: Sequence[int] = (),
) -> list[Cut]:
    """The cut that prunes exactly ``prune_count`` of each matrix, or ``pools[i]`` of the matrices of pool i together.

    Collective when ``ranks`` is: four exchanges, whatever the number of matrices, and four more when matrices of a pool
    are at their most. Raises NonFiniteScoreError, on every rank, when any score of any rank is NaN or infinite.
    """
    ranks = ranks or RankSums()
    device = device or torch.device("cpu")
    low = torch.full((len(matrices),), _LOWEST_KEY, dtype=torch.int64)
    search = Search(matrices, pools, low, torch.zeros_like(low))
    shift, local = _KEY_BITS, torch.empty(0)
    bins = low
    while shift:
        digit_bits = min(DIGIT_BITS, shift)
        shift -= digit_bits
        local = torch.stack(
            [
                _counts(m, first, shift, 1 << digit_bits, device)
                for m, first in zip(matrices, search.low.tolist(), strict=True)
            ]
        )
        counts = ranks.all_sum(local.clone()).cpu()
        if shift == _KEY_BITS - DIGIT_BITS:
            _refuse_non_finite(counts)
        bins = search.narrow(counts, shift)
    cuts = cuts_of(search, local.gather(1, bins.to(device).unsqueeze(1)).squeeze(1), ranks)
    cuts = [_from_the_first(cut, m) for cut, m in zip(cuts, matrices, strict=True)]
    _, at_most = search.ties()
    if at_most:
        alone = [replace(matrices[i], pool=None) for i in at_most]
        for i, cut in zip(at_most, select(alone, ranks, device), strict=True):
            cuts[i] = cut
    return cuts


def cuts_of(search: Search, equal_here: Tensor, ranks: RankSums) -> list[Cut]:
    """The cut of each matrix for this rank's own keys, of which ``equal_here`` equal the threshold. Collective."""
    ties, _ = search.ties()
    before = ranks.sum_of_lower_ranks(equal_here).tolist()
    return [Cut(key, tie - lower) for key, tie, lower in zip(search.low.tolist(), ties, before, strict=True)]


def _from_the_first(cut: Cut, matrix: MatrixKeys) -> Cut:
    """The cut counted from the first of the tiles, not from this rank's own first: equals before it come first too."""
    equal = 0
    for keys in _between(matrix, 0, matrix.own[0]) if matrix.own else ():
        equal += int((keys == cut.threshold).sum())
    return Cut(cut.threshold, max(0, int(cut.ties) + equal))


def _between(matrix: MatrixKeys, first: int, last: int) -> Iterator[Tensor]:
    """The keys at positions [first, last) of the tiles, flat."""
    at = 0
    for keys in matrix.tiles() if first < last else ():
        yield keys.flatten()[max(0, first - at) : max(0, last - at)]
        at += keys.numel()
        if at >= last:
            break


def _counts(matrix: MatrixKeys, low: int, shift: int, bins: int, device: torch.device) -> Tensor:
    """Counts, (bins,) int64, of this rank's own keys in bins of 2**shift keys from ``low`` on."""
    counts = torch.zeros(bins, dtype=torch.int64, device=device)
    for keys in matrix.tiles() if matrix.own is None else _between(matrix, *matrix.own):
        counts += histogram(keys.flatten(), low, shift, bins)
    return counts


def _refuse_non_finite(counts: Tensor) -> None:
    """NaN and infinity have the bins at either end: the first digit is sign, exponent and two more bits."""
    width = _KEY_BITS - DIGIT_BITS
    first, last = (LOWEST_FINITE - _LOWEST_KEY) >> width, (HIGHEST_FINITE - _LOWEST_KEY) >> width
    bad = (counts[:, :first].sum(1) + counts[:, last + 1 :].sum(1)).nonzero().flatten()
    if bad.numel():
        raise NonFiniteScoreError(bad.tolist())


def keep_mask(scores: Tensor, count: int) -> Tensor:
    """bool mask of ``scores`` (any shape, fp32) that drops the ``count`` smallest: selection on one rank."""
    keys = order_keys(scores)
    (cut,) = select([MatrixKeys(count, lambda: iter((keys,)))], device=scores.device)
    return cut.keep(keys)[0]
