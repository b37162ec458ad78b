"""Selection that reads the keys once: a sample brackets the cut, and the exact cut is found among the few keys inside.

Each rank contributes the keys at fixed positions, one per stratum of a matrix. Order statistics of this sample bracket
the cut, so widely that it is missed about once in a million times. One pass over the keys then counts the keys below
the bracket, marks those above as kept, and stores those inside, among which the exact cut is narrowed down. A matrix
whose bracket missed, or which had too many keys inside (many equal scores), is passed to
:func:`pst_ds.core.select.select`: the result never depends on the sample.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.bits import pack_shard, set_bits_
from pst_ds.core.kernels.triton.scan import KernelScans, sample_keys
from pst_ds.core.kernels.triton.table import OwnKeys, fit_together
from pst_ds.core.keys import HIGHEST_FINITE, LOWEST_FINITE, Classifier, SingleWeights, histograms, keys_of
from pst_ds.core.select import DIGIT_BITS, MatrixKeys, NonFiniteScoreError, RankSums, Search, select

_CPU = torch.device("cpu")
# Fraction of a matrix's keys that is sampled, and its bounds. Matrices below the minimum are read in full.
SAMPLE_SHARE = 1 / 64
MIN_SAMPLE = 4096
MAX_SAMPLE = 32768
MAX_POOLED_SAMPLE = 1 << 21
"""Sampled keys of all pooled matrices together, at least one per matrix."""
_SCORED_AT_ONCE = {"cpu": 1 << 15}
"""Sampled weights, of one or several matrices, that are scored in one call; 2**20 on other devices."""
# Counts per exchange, and the minimum number of bits by which each exchange narrows the intervals.
MAX_COUNTS = 1 << 21
LEAST_DIGIT_BITS = 4
# Columns of the counts of one pass.
BELOW = 0
NOT_FINITE = 1
OVERFLOWED = 2
INSIDE = 3
NUM_COUNTS = 4
BRACKET_DEVIATIONS = 5.0
"""Half width of a bracket in standard deviations of the cut's position in the sample: missed with probability 6e-7."""


def select_bits(
    matrices: Sequence[MatrixKeys],
    ranks: RankSums | None = None,
    device: torch.device | None = None,
    pools: Sequence[int] = (),
) -> list[Tensor]:
    """Return the bits of this rank's kept keys per matrix, (ceil(num_keys / 8),) uint8; cuts exactly as ``select``.

    Every matrix needs ``num_keys``, ``num_in_all`` and ``sample``. Collective if ``ranks`` is: at most 6 exchanges, 7
    with pools, while at most 1,024 rows are counted (:class:`pst_ds.core.select.Search`), plus ``select``'s if a
    matrix needs it. Raises NonFiniteScoreError on every rank.
    """
    ranks = ranks or RankSums()
    device = device or torch.device("cpu")
    brackets = _brackets(matrices, pools, _sample(matrices, ranks, device))
    search = Search(matrices, pools, [b.low for b in brackets], ranks)
    # Digits have fewer bits if many rows of counts are exchanged, so that an exchange has at most MAX_COUNTS of them.
    # The brackets come from summed samples: every rank computes the same shift, and so makes the same exchanges.
    most_bits = (MAX_COUNTS // max(1, len(search.low))).bit_length() - 1
    digit_bits = max(LEAST_DIGIT_BITS, min(DIGIT_BITS, most_bits))
    shift = max(0, max((b.high - b.low).bit_length() for b in brackets) - digit_bits)
    scans = _scans([matrices[i] for i in search.present], [brackets[i] for i in search.present], device)
    missed = _first_counts(search, scans, shift, 1 << digit_bits)
    while shift:
        width = shift
        shift = max(0, shift - digit_bits)
        there = scans.histograms(search.thresholds_here, shift, 1 << (width - shift))
        search.narrow(*search.exchange(there, search.offered), shift)
    cuts = search.cuts()
    present = [cuts[i] for i in search.present]
    decided = scans.decide([cut.threshold for cut in present], [int(cut.ties) for cut in present])
    bits = [torch.empty(0, dtype=torch.uint8, device=device)] * len(matrices)
    for i, kept in zip(search.present, decided, strict=True):
        bits[i] = kept
    at_most, at_most_here = search.at_most()
    # ``missed`` and ``at_most`` are equal on every rank, so all ranks enter select together, or none does.
    again = sorted({*missed, *at_most})
    if again:
        _decide_by_select(again, missed, matrices, pools, bits, ranks, device)
    # These matrices are whole on this rank: other ranks take no part in their selection.
    only_here = [i for i in at_most_here if i not in missed]
    if only_here:
        _decide_by_select(only_here, (), matrices, pools, bits, RankSums(), device)
    return bits


def _first_counts(search: Search, scans: "_TorchScans | KernelScans", shift: int, bins: int) -> set[int]:
    """Start ``search`` in its brackets. Return the matrices, in whole pools, that missed or had too many keys inside.

    Collective: one exchange. Raises NonFiniteScoreError.
    """
    there = torch.cat([scans.counts(), scans.histograms(search.thresholds_here, shift, bins)], 1)

    def offered(here: Tensor) -> Tensor:
        # In this order: offered() counts on from ``below_here``, which is zero for the keys below the bracket, and
        # their number for those inside.
        below = search.offered(here[:, :NOT_FINITE])
        flags = search.added(here[:, NOT_FINITE:INSIDE])
        search.below_here = here[:, BELOW]
        inside = search.offered(here[:, INSIDE:NUM_COUNTS])
        digits = search.offered(here[:, NUM_COUNTS:])
        return torch.cat([below, flags, inside, digits], 1)

    # Counts and the first histograms share one exchange, whose latency is most of its cost.
    here, counts = search.exchange(there, offered)
    search.below_here = here[:, BELOW]
    search.below, not_finite, overflowed, inside = counts[:, :NUM_COUNTS].unbind(1)
    if not_finite.any():  # a sum over ranks: all raise, after one more exchange that names the matrices
        raise NonFiniteScoreError(search.everywhere(here[:, NOT_FINITE]))
    missed = search.missed(inside, overflowed)
    search.narrow(here[:, NUM_COUNTS:], counts[:, NUM_COUNTS:], shift)
    return missed


@dataclass(frozen=True, slots=True)
class _Bracket:
    """Interval of keys, ends included, that contains a matrix's cut, and the most keys stored from inside it."""

    low: int
    high: int
    most_inside: int

    def room_for(self, matrix: MatrixKeys) -> int:
        """Return how many keys inside the bracket one rank stores."""
        return min(matrix.num_keys, self.most_inside)


class _TorchScans:
    """One pass over this rank's keys of all matrices, classified by their brackets; on CPUs with native loops."""

    def __init__(self, matrices: Sequence[MatrixKeys], brackets: Sequence[_Bracket], device: torch.device):
        self._scans = []
        for matrix, bracket in zip(matrices, brackets, strict=True):
            self._scans.append(_Scan(matrix, bracket, device))
        self._none = torch.zeros(0, dtype=torch.int64, device=device)

    def counts(self) -> Tensor:
        """Return (matrices, NUM_COUNTS) int64: keys BELOW, NOT_FINITE and INSIDE, and whether it OVERFLOWED."""
        if not self._scans:
            return self._none.view(0, NUM_COUNTS)
        return torch.stack([scan.counts for scan in self._scans])

    def histograms(self, lows: Sequence[int], shift: int, bins: int) -> Tensor:
        """Return the counts of (key - low) >> shift of the keys inside of each matrix: (matrices, bins) int64."""
        if not self._scans:
            return self._none.view(0, bins)
        return histograms([scan.keys for scan in self._scans], lows, shift, bins)

    def decide(self, thresholds: Sequence[int], ties: Sequence[int]) -> list[Tensor]:
        """Return the kept bits of each matrix: keys above its threshold, and equal keys except the first ``ties``."""
        for scan, threshold, count in zip(self._scans, thresholds, ties, strict=True):
            scan.decide(threshold, count)
        return [scan.bits for scan in self._scans]


class _Scan:
    """Pass over one matrix, for :class:`_TorchScans`."""

    def __init__(self, matrix: MatrixKeys, bracket: _Bracket, device: torch.device):
        room = bracket.room_for(matrix)
        classifier = Classifier(matrix.num_keys, bracket.low, bracket.high, room=room, device=device)
        for keys in matrix.tiles():
            classifier.take(keys.flatten())
        self.keys, index = classifier.inside()
        self._index = _RisingNumbers(index)
        self.bits = pack_shard(classifier.above(), -(-matrix.num_keys // 8))
        self.counts = classifier.counts()

    def decide(self, threshold: int, ties: int) -> None:
        """Set the kept bits among the keys inside: keys above ``threshold``, and equal keys except the first
        ``ties``."""
        equal = self.keys == threshold
        # A running count of equal keys, so that the host need not know how many there are.
        equal_and_kept = equal & (equal.cumsum(0) > ties)
        set_bits_(self.bits, self._index.all(), (self.keys > threshold) | equal_and_kept)


class _RisingNumbers:
    """Non-decreasing integers, (n,), stored on a CPU as one byte per difference below 255.

    Not on other devices: counting the larger differences would make the host wait.
    """

    def __init__(self, numbers: Tensor):
        self._numbers: Tensor | None = None
        if numbers.device.type != "cpu":
            self._numbers = numbers
        else:
            steps = numbers.diff(prepend=numbers.new_zeros(1))
            self._steps = steps.clamp(max=255).to(torch.uint8)
            self._large = steps[steps >= 255]

    def all(self) -> Tensor:
        """Return the numbers."""
        if self._numbers is not None:
            return self._numbers
        steps = self._steps.to(self._large.dtype)
        steps[self._steps == 255] = self._large
        return steps.cumsum(0, dtype=steps.dtype)


def _scans(
    matrices: Sequence[MatrixKeys], brackets: Sequence[_Bracket], device: torch.device
) -> _TorchScans | KernelScans:
    """Return the pass over these matrices, by GPU kernels if they compute all of their keys."""
    by_kernels = _own_keys(matrices)
    if not by_kernels:
        return _TorchScans(matrices, brackets, device)
    rooms = [bracket.room_for(m) for m, bracket in zip(matrices, brackets, strict=True)]
    return KernelScans(by_kernels, [(b.low, b.high) for b in brackets], rooms)


def _own_keys(matrices: Sequence[MatrixKeys]) -> list[OwnKeys]:
    """Return the inputs of the kernels; none unless every matrix has them, and one launch can serve all."""
    own_keys = [m.own_keys for m in matrices if m.own_keys is not None]
    if len(own_keys) < len(matrices) or not own_keys or not fit_together(own_keys):
        return []
    return own_keys


def _sample(matrices: Sequence[MatrixKeys], ranks: RankSums, device: torch.device) -> list[Tensor]:
    """Return the sampled keys of every matrix, on the CPU. Collective: one exchange."""
    sizes = _sample_sizes(matrices)
    if by_kernels := _own_keys(matrices):
        return list(ranks.all_sum(sample_keys(by_kernels, sizes)).cpu().split(sizes))
    # Zero where another rank has the key: a sum over ranks puts the sample together in one exchange.
    sampled = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
    waiting: list[tuple[Tensor, slice | Tensor, SingleWeights]] = []
    for matrix, size, out in zip(matrices, sizes, sampled.split(sizes), strict=True):
        there = sample_positions(matrix.num_in_all, size, device)
        assert matrix.sample is not None, "a matrix without a sample"
        places, keys = matrix.sample(sample_positions(matrix.num_in_all, size), there)
        if isinstance(keys, Tensor):
            out[places] = keys
            continue
        # Weights of several matrices are scored together: on a GPU, a launch costs more than a small sample.
        waiting.append((out, places, keys))
        if sum(single.weight.numel() for *_, single in waiting) >= _SCORED_AT_ONCE.get(device.type, 1 << 20):
            _write_keys(waiting)
            waiting = []
    _write_keys(waiting)
    return list(ranks.all_sum(sampled).cpu().split(sizes))


def _write_keys(waiting: Sequence[tuple[Tensor, slice | Tensor, SingleWeights]]) -> None:
    """Score weights, and write their keys to the places of each sample: (sample, places, weights)."""
    singles = [single for *_, single in waiting]
    for (out, places, _), keys in zip(waiting, keys_of(singles), strict=True):
        out[places] = keys


def sample_size(numel: int) -> int:
    """Return how many keys of a matrix of ``numel`` are sampled."""
    return min(numel, max(MIN_SAMPLE, min(MAX_SAMPLE, int(numel * SAMPLE_SHARE))))


def _sample_sizes(matrices: Sequence[MatrixKeys]) -> list[int]:
    """Return how many keys of each matrix are sampled. A pool needs no more keys for having many matrices."""
    num_pooled = sum(matrix.pool is not None for matrix in matrices)
    pooled_share = max(1, MAX_POOLED_SAMPLE // max(1, num_pooled))
    sizes: list[int] = []
    for matrix in matrices:
        size = sample_size(matrix.num_in_all)
        if matrix.pool is not None:
            size = min(size, pooled_share)
        sizes.append(size)
    return sizes


@lru_cache(maxsize=32)
def sample_positions(numel: int, size: int, device: torch.device = _CPU) -> Tensor:
    """Return a position in each of ``size`` equal strata of [0, numel): int64, increasing. Do not modify it."""
    number = torch.arange(size + 1, dtype=torch.int64, device=device)
    edges = number * numel // max(1, size)
    mixed = number[:-1] * 0x9E3779B1 & 0xFFFFFFFF  # Knuth's multiplicative hash
    return edges[:-1] + (mixed * (edges[1:] - edges[:-1]) >> 32)


def _half_width(matrix: MatrixKeys, size: int) -> int:
    """Return half the width of a matrix's bracket, in keys of the whole matrix, of which ``size`` are sampled."""
    numel = matrix.num_in_all
    if numel == 0:
        return 0
    # A pool's cut may lie anywhere in one of its matrices, and a share of one half deviates the most.
    share_below = 0.5
    if matrix.pool is None:
        share_below = matrix.prune_count / numel
    # The last factor is that of a sample without replacement: zero if all keys are sampled.
    deviation = math.sqrt(share_below * (1.0 - share_below) / size * (1.0 - size / numel))
    # Two strata are added, because a sampled position represents a whole stratum.
    return math.ceil(BRACKET_DEVIATIONS * deviation * numel + 2 * numel / size)


def _brackets(matrices: Sequence[MatrixKeys], pools: Sequence[int], samples: list[Tensor]) -> list[_Bracket]:
    """Return the bracket of each matrix, from the samples of all."""
    of_pool: list[_Bracket] = []
    for pool, wanted in enumerate(pools):
        members: list[MatrixKeys] = []
        samples_of_members: list[Tensor] = []
        for matrix, sample in zip(matrices, samples, strict=True):
            if matrix.pool == pool:
                members.append(matrix)
                samples_of_members.append(sample)
        of_pool.append(_pool_bracket(members, samples_of_members, wanted))
    brackets: list[_Bracket] = []
    for matrix, sample in zip(matrices, samples, strict=True):
        if matrix.pool is None:
            brackets.append(_matrix_bracket(matrix, sample))
        else:  # matrices of a pool share a threshold, and so a bracket
            brackets.append(of_pool[matrix.pool])
    return brackets


def _matrix_bracket(matrix: MatrixKeys, sample: Tensor) -> _Bracket:
    """Return the bracket of a matrix that is ranked by itself."""
    half = _half_width(matrix, sample.numel())
    scale = sample.numel() / max(1, matrix.num_in_all)
    first = math.floor((matrix.prune_count - half) * scale)
    last = math.ceil((matrix.prune_count + half) * scale)
    places = [place for place in (first, last) if 0 <= place < sample.numel()]
    ordered = sample.numpy()
    if places:  # two order statistics need no sorted sample
        ordered = np.partition(ordered, places)
    # Beyond the ends of the sample nothing is known: the bracket is open there.
    low = LOWEST_FINITE
    high = HIGHEST_FINITE
    if 1 <= first < sample.numel():
        low = int(ordered[first])
    if 0 <= last < sample.numel():
        high = int(ordered[last])
    return _Bracket(low=low, high=max(low, high), most_inside=4 * half + MIN_SAMPLE)


def _pool_bracket(members: Sequence[MatrixKeys], samples: Sequence[Tensor], wanted: int) -> _Bracket:
    """Return the bracket of the matrices of a pool, which prunes ``wanted`` keys of them together."""
    # The errors of the matrices' samples are independent, so their variances add up.
    variance = 0
    for matrix, sample in zip(members, samples, strict=True):
        variance += _half_width(matrix, sample.numel()) ** 2
    half = math.ceil(math.sqrt(variance))
    samples = [sample.sort().values for sample in samples]

    def pruned_below(key: int) -> float:
        """Return about how many keys the pool prunes if it prunes those below ``key``."""
        total = 0.0
        for matrix, sample in zip(members, samples, strict=True):
            below = int(torch.searchsorted(sample, key)) / max(1, sample.numel()) * matrix.num_in_all
            total += min(below, matrix.prune_count)
        return total

    low = _last_key_where(lambda key: pruned_below(key) <= wanted - half)
    high = _last_key_where(lambda key: pruned_below(key) < wanted + half)
    return _Bracket(low=low, high=max(low, high), most_inside=4 * half + MIN_SAMPLE)


def _last_key_where(holds: Callable[[int], bool]) -> int:
    """Return the last finite key for which ``holds``, which is true up to some key; or the lowest."""
    low = LOWEST_FINITE
    high = HIGHEST_FINITE + 1
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _decide_by_select(
    again: Sequence[int],
    missed: Collection[int],
    matrices: Sequence[MatrixKeys],
    pools: Sequence[int],
    bits: list[Tensor],
    ranks: RankSums,
    device: torch.device,
) -> None:
    """Decide again, from all keys, the pools that missed and the matrices that reached their maximum."""
    pools_that_missed: set[int] = set()
    for i in missed:
        pool = matrices[i].pool
        if pool is not None:
            pools_that_missed.add(pool)
    remaining_pools = sorted(pools_that_missed)
    chosen: list[MatrixKeys] = []
    for i in again:
        # A matrix that only reached its maximum loses that many keys. It leaves its pool.
        new_pool: int | None = None
        pool = matrices[i].pool
        if i in missed and pool is not None:
            new_pool = remaining_pools.index(pool)
        chosen.append(replace(matrices[i], pool=new_pool))
    cuts = select(chosen, ranks, device, [pools[pool] for pool in remaining_pools])
    for i, cut in zip(again, cuts, strict=True):
        keep = torch.empty(matrices[i].num_keys, dtype=torch.uint8, device=device)
        position = 0
        for keys in matrices[i].tiles():
            kept, cut = cut.keep(keys.flatten())
            keep[position : position + kept.numel()] = kept
            position += kept.numel()
        bits[i] = pack_shard(keep, -(-matrices[i].num_keys // 8))
