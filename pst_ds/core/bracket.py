"""Selection that reads the keys once: a sample brackets the cut, and the exact cut is found among the few keys inside.

One key of every stratum of a matrix, at a place fixed by its number, is shown to all ranks. Order statistics of the
sample bracket the cut so widely that it is missed about once in a million times. One pass over the keys then counts
those below, marks those above as kept, and remembers those inside; the exact cut is narrowed down among these. A matrix
whose bracket missed, or had too much inside (many equal scores), is left to :func:`pst_ds.core.select.select`: the
result never depends on the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pst_ds.core.bits import pack_shard, set_bits_
from pst_ds.core.kernels.scan import KernelScans
from pst_ds.core.keys import HIGHEST_FINITE, LOWEST_FINITE, Classifier, histogram
from pst_ds.core.select import DIGIT_BITS, MatrixKeys, NonFiniteScoreError, RankSums, Search, cuts_of, select

_CPU = torch.device("cpu")
SAMPLE_SHARE, MIN_SAMPLE, MAX_SAMPLE = 1 / 64, 4096, 32768
"""Share of a matrix's keys that is sampled, and its bounds; a matrix of fewer keys than the lower is sampled whole."""
MAX_POOLED_SAMPLE, MIN_POOLED_SAMPLE = 1 << 21, 64
"""Keys that are sampled of all matrices in pools together; and the least of each, as far as it has them."""
BELOW, NOT_FINITE, OVERFLOWED, INSIDE, NUM_COUNTS = 0, 1, 2, 3, 4
"""Columns of a pass's counts."""
BRACKET_DEVIATIONS = 5.0
"""Half width of a bracket in standard deviations of the sample's rank of the cut: missed with probability 6e-7."""


def select_bits(
    matrices: Sequence[MatrixKeys],
    ranks: RankSums | None = None,
    device: torch.device | None = None,
    pools: Sequence[int] = (),
) -> list[Tensor]:
    """Bits of the kept among this rank's keys of each matrix, (ceil(num_keys / 8),) uint8; exactly as ``select`` cuts.

    Every matrix needs ``num_keys``, ``num_in_all`` and ``sample``. Collective when ``ranks`` is: at most 6 exchanges,
    whatever the number of matrices, and those of ``select`` when some matrix is left to it. Raises
    NonFiniteScoreError, on every rank, when any score of any rank is NaN or infinite.
    """
    ranks, device = ranks or RankSums(), device or torch.device("cpu")
    brackets = _brackets(matrices, pools, _sample(matrices, ranks, device))
    shift = max(0, max((b.high - b.low).bit_length() for b in brackets) - DIGIT_BITS)
    found = _scans(matrices, brackets, device)
    first_digits = found.histograms([b.low for b in brackets], shift, 1 << DIGIT_BITS)
    counts = ranks.all_sum(torch.cat([found.counts(), first_digits], 1)).cpu()
    bad = counts[:, NOT_FINITE].nonzero().flatten().tolist()
    if bad:
        raise NonFiniteScoreError(bad)
    low = torch.tensor([b.low for b in brackets])
    search = Search(matrices, pools, low, counts[:, BELOW])
    missed = _missed(search, counts)
    _narrow(search, found, counts[:, NUM_COUNTS:], shift, ranks)
    cuts = cuts_of(search, found.num_equal(search.low.tolist()), ranks)
    bits = found.decide([cut.threshold for cut in cuts], [int(cut.ties) for cut in cuts])
    again = sorted({*missed, *search.ties()[1]})
    if again:
        _decide_by_select(again, missed, matrices, pools, bits, ranks, device)
    return bits


@dataclass(frozen=True, slots=True)
class _Bracket:
    """Keys that the cut of a matrix lies between, both included; and how many keys inside are too many."""

    low: int
    high: int
    most_inside: int

    def room_for(self, matrix: MatrixKeys) -> int:
        """How many keys inside one rank remembers."""
        return min(matrix.num_keys, self.most_inside)


class _Scans(Protocol):
    """One pass over this rank's keys of all matrices, sorted about their brackets; every key is this rank's own."""

    def counts(self) -> Tensor:
        """Return (matrices, NUM_COUNTS) int64: keys BELOW, NOT_FINITE, whether OVERFLOWED, INSIDE."""

    def histograms(self, lows: Sequence[int], shift: int, bins: int) -> Tensor:
        """Return (matrices, bins) int64, counts of (key - low) >> shift of the keys inside, with each matrix's low."""

    def num_equal(self, thresholds: Sequence[int]) -> Tensor:
        """Return how many keys of each matrix equal its threshold: (matrices,) int64."""

    def decide(self, thresholds: Sequence[int], ties: Sequence[int]) -> list[Tensor]:
        """Return each matrix's bits of the kept: keys above its threshold, and its equals but for the first ties."""


class _TorchScans:
    """By tiles of keys, on any device; on CPUs in native loops."""

    def __init__(self, matrices: Sequence[MatrixKeys], brackets: Sequence[_Bracket], device: torch.device):
        self._found = [_Scan(m, bracket, device) for m, bracket in zip(matrices, brackets, strict=True)]

    def counts(self) -> Tensor:
        return torch.stack([scan.counts for scan in self._found])

    def histograms(self, lows: Sequence[int], shift: int, bins: int) -> Tensor:
        return torch.stack([histogram(s.keys, low, shift, bins) for s, low in zip(self._found, lows, strict=True)])

    def num_equal(self, thresholds: Sequence[int]) -> Tensor:
        return torch.stack([(s.keys == cut).sum() for s, cut in zip(self._found, thresholds, strict=True)])

    def decide(self, thresholds: Sequence[int], ties: Sequence[int]) -> list[Tensor]:
        for scan, threshold, count in zip(self._found, thresholds, ties, strict=True):
            scan.decide(threshold, count)
        return [scan.bits for scan in self._found]


class _Scan:
    """One matrix of :class:`_TorchScans`."""

    def __init__(self, matrix: MatrixKeys, bracket: _Bracket, device: torch.device):
        room = bracket.room_for(matrix)
        found = Classifier(matrix.num_keys, bracket.low, bracket.high, room=room, device=device)
        for keys in matrix.tiles():
            found.take(keys.flatten())
        self.keys, self.index = found.inside()
        self.bits = pack_shard(found.above(), -(-matrix.num_keys // 8))
        self.counts = found.counts()

    def decide(self, threshold: int, ties: int) -> None:
        """Set the bits of the kept among the keys inside: those above, and the equals but for the first ``ties``."""
        equal = self.keys == threshold
        set_bits_(self.bits, self.index, (self.keys > threshold) | (equal & (equal.cumsum(0) > ties)))


def _scans(matrices: Sequence[MatrixKeys], brackets: Sequence[_Bracket], device: torch.device) -> _Scans:
    own = [m.own_keys for m in matrices if m.own_keys is not None]
    if len(own) < len(matrices):
        return _TorchScans(matrices, brackets, device)
    rooms = [bracket.room_for(m) for m, bracket in zip(matrices, brackets, strict=True)]
    return KernelScans(own, [(b.low, b.high) for b in brackets], rooms)


def _sample(matrices: Sequence[MatrixKeys], ranks: RankSums, device: torch.device) -> list[Tensor]:
    """The sampled keys of every matrix, on the CPU. Collective: one exchange."""
    sizes = _sample_sizes(matrices)
    own = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    for matrix, size, out in zip(matrices, sizes, own.split(sizes), strict=True):
        there = sample_positions(matrix.num_in_all, size, device)
        if matrix.own_keys is not None:
            matrix.own_keys.keys_at(there, out)
            continue
        assert matrix.sample is not None, "a matrix without a sample"
        out.copy_(matrix.sample(sample_positions(matrix.num_in_all, size), there))
    return list(ranks.all_sum(own).cpu().split(sizes))


def sample_size(numel: int) -> int:
    return min(numel, max(MIN_SAMPLE, min(MAX_SAMPLE, int(numel * SAMPLE_SHARE))))


def _sample_sizes(matrices: Sequence[MatrixKeys]) -> list[int]:
    """How many keys of each matrix are sampled. What a pool is cut by needs no more for being many matrices."""
    share = MAX_POOLED_SAMPLE // max(1, sum(m.pool is not None for m in matrices))
    sizes = [sample_size(m.num_in_all) for m in matrices]
    return [
        n if m.pool is None else min(n, max(share, MIN_POOLED_SAMPLE)) for m, n in zip(matrices, sizes, strict=True)
    ]


@lru_cache(maxsize=32)
def sample_positions(numel: int, size: int, device: torch.device = _CPU) -> Tensor:
    """One position in each of ``size`` equal strata of [0, numel), int64, rising; not to be changed."""
    number = torch.arange(size + 1, dtype=torch.int64, device=device)
    edges = number * numel // max(1, size)
    mixed = number[:-1] * 0x9E3779B1 & 0xFFFFFFFF  # Knuth's multiplicative hash
    return edges[:-1] + (mixed * (edges[1:] - edges[:-1]) >> 32)


def _half_width(matrix: MatrixKeys, size: int) -> int:
    """Half the width of a matrix's bracket, in keys of the whole matrix, of which ``size`` are sampled."""
    numel = matrix.num_in_all
    if numel == 0:
        return 0
    q = 0.5 if matrix.pool is not None else matrix.prune_count / numel
    deviation = math.sqrt(q * (1.0 - q) / size * (1.0 - size / numel))
    return math.ceil(BRACKET_DEVIATIONS * deviation * numel + 2 * numel / size)


def _brackets(matrices: Sequence[MatrixKeys], pools: Sequence[int], samples: list[Tensor]) -> list[_Bracket]:
    """The bracket of every matrix, the same within a pool."""
    of_pool = []
    for pool, wanted in enumerate(pools):
        members = [i for i, m in enumerate(matrices) if m.pool == pool]
        of_pool.append(_pool_bracket([matrices[i] for i in members], [samples[i] for i in members], wanted))
    return [
        _matrix_bracket(m, sample) if m.pool is None else of_pool[m.pool]
        for m, sample in zip(matrices, samples, strict=True)
    ]


def _matrix_bracket(matrix: MatrixKeys, sample: Tensor) -> _Bracket:
    half, scale = _half_width(matrix, sample.numel()), sample.numel() / max(1, matrix.num_in_all)
    first = math.floor((matrix.prune_count - half) * scale)
    last = math.ceil((matrix.prune_count + half) * scale)
    wanted = [at for at in (first, last) if 0 <= at < sample.numel()]
    ordered = np.partition(sample.numpy(), wanted) if wanted else sample.numpy()
    low = int(ordered[first]) if 1 <= first < sample.numel() else LOWEST_FINITE
    high = int(ordered[last]) if 0 <= last < sample.numel() else HIGHEST_FINITE
    return _Bracket(low, max(low, high), 4 * half + MIN_SAMPLE)


def _pool_bracket(members: Sequence[MatrixKeys], samples: Sequence[Tensor], wanted: int) -> _Bracket:
    half = math.ceil(math.sqrt(sum(_half_width(m, s.numel()) ** 2 for m, s in zip(members, samples, strict=True))))
    samples = [sample.sort().values for sample in samples]

    def pruned_below(key: int) -> float:
        total = 0.0
        for matrix, sample in zip(members, samples, strict=True):
            below = int(torch.searchsorted(sample, key)) / max(1, sample.numel()) * matrix.num_in_all
            total += min(below, matrix.prune_count)
        return total

    low = _last_key_where(lambda key: pruned_below(key) <= wanted - half)
    high = _last_key_where(lambda key: pruned_below(key) < wanted + half)
    return _Bracket(low, max(low, high), 4 * half + MIN_SAMPLE)


def _last_key_where(holds: Callable[[int], bool]) -> int:
    """The last finite key that ``holds``, which is true up to some key and false from there on; the lowest if none."""
    low, high = LOWEST_FINITE, HIGHEST_FINITE + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _missed(search: Search, counts: Tensor) -> list[int]:
    """Matrices, of whole pools, whose cut is not in their bracket, or that had too much inside it."""
    below, inside = counts[:, BELOW], counts[:, INSIDE]
    holds = (search.pruned_up_to(below) <= search.wanted) & (search.pruned_up_to(below + inside) >= search.wanted)
    overflowed = torch.zeros_like(search.wanted).index_add_(0, search.pool_of, counts[:, OVERFLOWED])
    return (~holds | (overflowed > 0))[search.pool_of].nonzero().flatten().tolist()


def _narrow(search: Search, found: _Scans, counts: Tensor, shift: int, ranks: RankSums) -> None:
    """Narrow every interval to one key. ``counts``: (num matrices, bins) over all ranks, of the first digit."""
    search.narrow(counts, shift)
    while shift:
        width, shift = shift, max(0, shift - DIGIT_BITS)
        local = found.histograms(search.low.tolist(), shift, 1 << (width - shift))
        search.narrow(ranks.all_sum(local).cpu(), shift)


def _decide_by_select(
    again: list[int],
    missed: list[int],
    matrices: Sequence[MatrixKeys],
    pools: Sequence[int],
    bits: list[Tensor],
    ranks: RankSums,
    device: torch.device,
) -> None:
    """Redo some matrices by passes over all their keys: whole pools that missed, and matrices at their pool's most."""
    kept_pools = sorted({pool for i in missed if (pool := matrices[i].pool) is not None})
    chosen = []
    for i in again:
        pool = matrices[i].pool if i in missed else None
        chosen.append(replace(matrices[i], pool=None if pool is None else kept_pools.index(pool)))
    cuts = select(chosen, ranks, device, [pools[pool] for pool in kept_pools])
    for i, cut in zip(again, cuts, strict=True):
        keep = torch.empty(matrices[i].num_keys, dtype=torch.uint8, device=device)
        position = 0
        for keys in matrices[i].tiles():
            kept, cut = cut.keep(keys.flatten())
            keep[position : position + kept.numel()] = kept
            position += kept.numel()
        bits[i] = pack_shard(keep, -(-matrices[i].num_keys // 8))
