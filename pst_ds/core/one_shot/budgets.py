"""Sparsity per block, lower for blocks with more outliers (OWL: Yin et al., 2023, arXiv 2310.05175).

A weight is an outlier if |W_ij| ||x_j|| is more than 5 times the mean of its block. Blocks with more outliers lose
fewer weights. The sparsities stay within a bounded distance, and the total number of pruned weights equals uniform
sparsity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

STANDS_OUT = 5.0
"""Multiple of a block's mean score above which a weight is an outlier (the paper's M)."""
SPREAD = 0.08
"""Largest distance of a block's sparsity from the mean (the paper's lambda)."""


def outlier_share(scores: Callable[[], Iterator[Tensor]], multiple: float = STANDS_OUT) -> float:
    """Return the fraction of a block's weights whose score is more than ``multiple`` times the mean of the block.

    ``scores`` is called twice and yields the block's fp32 scores, at least 0, in parts of any shape. Raises
    FloatingPointError for scores that are not finite.
    """
    total, number = 0.0, 0
    for part in scores():
        total, number = total + float(part.sum(dtype=torch.float64)), number + part.numel()
    if not math.isfinite(total):
        raise FloatingPointError("scores are not finite")
    return sum(int((part > multiple * total / number).sum()) for part in scores()) / number


def zeros_by_outliers(outliers: Sequence[float], count: int, size: int, spread: float = SPREAD) -> list[int]:
    """Return how many of ``size`` weights each of several layers loses, ``count`` on average, from their ``outliers``.

    A layer with more outliers than the mean loses proportionally fewer weights. The layer furthest from the mean loses
    floor(``spread`` * size) fewer or more than ``count``, but never all weights. The mean is exactly ``count``: among
    equal remainders, the first layers lose one more.
    """
    reach = min(math.floor(spread * size), count, size - 1 - count)
    exact = [Fraction(one) for one in outliers]  # exact, because the mean of equal floats may be another float
    mean = sum(exact, Fraction()) / len(exact)
    apart = [mean - one for one in exact]
    widest = max(map(abs, apart))
    if widest == 0:
        return [count] * len(outliers)
    wanted = [count + reach * one / widest for one in apart]
    found = [math.floor(one) for one in wanted]
    order = sorted(range(len(wanted)), key=lambda i: (found[i] - wanted[i], i))
    for i in order[: count * len(found) - sum(found)]:
        found[i] += 1
    return found
