"""Shares of zeros by block: fewer where more weights stand out (OWL: Yin et al., 2023, arXiv 2310.05175).

A weight stands out whose |W_ij| ||x_j|| is more than 5 times the mean of its block. The more of them a block has, the
fewer of its weights go; how far blocks may be apart is bounded, and as many go in all as with equal shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

STANDS_OUT = 5.0
"""Times the mean of a block (the paper's M)."""
SPREAD = 0.08
"""How far a block's share of zeros may be from the mean of all (the paper's lambda)."""


def outlier_share(scores: Callable[[], Iterator[Tensor]], multiple: float = STANDS_OUT) -> float:
    """Return the share of the weights of a block whose score is more than ``multiple`` times the mean of all of them.

    ``scores`` is called twice and yields the block's fp32 scores, none below 0, in parts of any shape. Raises
    FloatingPointError for scores that are not finite.
    """
    total, number = 0.0, 0
    for part in scores():
        total, number = total + float(part.sum(dtype=torch.float64)), number + part.numel()
    if not math.isfinite(total):
        raise FloatingPointError("scores are not finite")
    return sum(int((part > multiple * total / number).sum()) for part in scores()) / number


def zeros_by_outliers(outliers: Sequence[float], count: int, size: int, spread: float = SPREAD) -> list[int]:
    """Return how many of ``size`` weights go in each of several layers, ``count`` on the mean, by their ``outliers``.

    A layer whose share of outliers is above the mean loses fewer, in proportion; the one furthest from it loses
    floor(``spread`` * size) fewer, or more, than ``count``, but never all. The sum is ``count`` for each, exactly: of
    equal remainders the first layers lose one more.
    """
    reach = min(math.floor(spread * size), count, size - 1 - count)
    exact = [Fraction(one) for one in outliers]  # a mean of equal floats may be another float
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
