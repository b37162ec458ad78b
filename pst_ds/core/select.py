"""Exact selection of the k smallest scores of many matrices at once, over scores that lie on many ranks.

Scores become order-preserving 32-bit keys; three radix passes over histograms find the k-th smallest key of every
matrix, with one sum over ranks each, and one exchange of tie counts settles equals: the lowest flat index is pruned
first. Counts are integers, so the result is the same for every world size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PASS_BITS = (11, 11, 10)
_KEY_BITS = sum(_PASS_BITS)


class NonFiniteScoreError(FloatingPointError):
    """Some scores are NaN or infinite; ``matrices`` has the positions of theirs in the call."""

    def __init__(self, matrices: list[int]):
        super().__init__(f"non-finite importance scores in matrices {matrices}")
        self.matrices = matrices


def _unchanged(counts: Tensor) -> Tensor:
    return counts


@dataclass(frozen=True, slots=True)
class RankSums:
    """The two collectives selection needs, on int64 tensors of equal shape on every rank.

    The defaults are for scores that lie whole on one rank.
    """

    all_sum: Callable[[Tensor], Tensor] = _unchanged
    """Element-wise sum over ranks."""
    sum_of_lower_ranks: Callable[[Tensor], Tensor] = torch.zeros_like
    """Element-wise sum over the ranks below this one, whose shards hold the lower flat indices."""


@dataclass(frozen=True, slots=True)
class MatrixKeys:
    """The keys of one matrix on this rank, and how many of the whole matrix to prune."""

    prune_count: int
    tiles: Callable[[], Iterator[Tensor]]
    """Called once a pass: int32 key tensors, together this rank's keys in rising flat order."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Prune the keys below ``threshold``, and the first ``ties`` of this rank's that equal it."""

    threshold: int
    ties: int

    def keep(self, keys: Tensor) -> tuple[Tensor, Cut]:
        """(mask of the kept among the next ``keys``, bool of their shape; the cut for the keys after these)."""
        kept = keys > self.threshold
        equal = keys == self.threshold
        num_equal = int(equal.sum())
        if num_equal > self.ties:
            # The first `ties` of the equals go, the rest stays.
            stay = equal.flatten().nonzero().flatten()[self.ties :]
            kept.view(-1)[stay] = True
        return kept, Cut(self.threshold, max(0, self.ties - num_equal))


def prune_count(sparsity: float, numel: int) -> int:
    """floor(sparsity * numel), in double precision: how many weights of a matrix are zero."""
    return math.floor(sparsity * numel)


def order_keys(scores: Tensor) -> Tensor:
    """int32 keys that sort like the fp32 ``scores``, with -0 equal to +0."""
    bits = scores.add(0.0).contiguous().view(torch.int32)  # -0.0 + 0.0 is +0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def select(
    matrices: Sequence[MatrixKeys], ranks: RankSums | None = None, device: torch.device | None = None
) -> list[Cut]:
    """The cut that prunes exactly ``prune_count`` of each matrix, for this rank's keys.

    Collective when ``ranks`` is: four exchanges in all, whatever the number of matrices. Raises NonFiniteScoreError,
    on every rank, when any score of any rank is NaN or infinite.
    """
    ranks = ranks or RankSums()
    wanted = torch.tensor([m.prune_count for m in matrices], dtype=torch.int64, device=device)
    prefix = torch.zeros_like(wanted)
    local = counts = torch.empty(0, device=device)
    remaining_bits = _KEY_BITS
    for bits in _PASS_BITS:
        remaining_bits -= bits
        local = torch.stack(
            [
                _histogram(m, known, bits, remaining_bits, wanted.device)
                for m, known in zip(matrices, prefix.tolist(), strict=True)
            ]
        )
        counts = ranks.all_sum(local.clone())
        if bits == _PASS_BITS[0] and remaining_bits == _KEY_BITS - bits:
            _refuse_non_finite(counts)
        cumulative = counts.cumsum(1)
        bin_index = (cumulative < wanted.unsqueeze(1)).sum(1).clamp_(max=counts.shape[1] - 1)
        below = cumulative.gather(1, bin_index.unsqueeze(1)) - counts.gather(1, bin_index.unsqueeze(1))
        wanted = wanted - below.squeeze(1)
        prefix = (prefix << bits) + bin_index
    equal_here = local.gather(1, bin_index.unsqueeze(1)).squeeze(1)
    ties = (wanted - ranks.sum_of_lower_ranks(equal_here)).clamp_(min=0)
    ties = torch.minimum(ties, equal_here)
    lowest = -(1 << (_KEY_BITS - 1))
    return [Cut(key + lowest, tie) for key, tie in zip(prefix.tolist(), ties.tolist(), strict=True)]


def _histogram(matrix: MatrixKeys, prefix: int, bits: int, shift: int, device: torch.device) -> Tensor:
    """Counts, (2**bits,) int64, of the next ``bits`` of those keys whose higher bits equal ``prefix``."""
    counts = torch.zeros(1 << bits, dtype=torch.int64, device=device)
    first_pass = shift + bits == _KEY_BITS
    half = 1 << (bits - 1)
    for keys in matrix.tiles():
        flat = keys.flatten()
        if first_pass:
            digits = (flat >> shift) + half  # the top digit is signed
        else:
            signed_prefix = prefix - (1 << (_KEY_BITS - shift - bits - 1))
            digits = (flat[(flat >> (shift + bits)) == signed_prefix] >> shift) & ((1 << bits) - 1)
        counts += torch.bincount(digits, minlength=1 << bits)
    return counts


def _refuse_non_finite(counts: Tensor) -> None:
    """The first digit is sign, exponent and two more bits: NaN and infinity have the four bins at either end."""
    bad = (counts[:, :4].sum(1) + counts[:, -4:].sum(1)).nonzero().flatten()
    if bad.numel():
        raise NonFiniteScoreError(bad.tolist())


def keep_mask(scores: Tensor, count: int) -> Tensor:
    """bool mask of ``scores`` (any shape, fp32) that drops the ``count`` smallest: selection on one rank."""
    keys = order_keys(scores)
    (cut,) = select([MatrixKeys(count, lambda: iter((keys,)))], device=scores.device)
    return cut.keep(keys)[0]
