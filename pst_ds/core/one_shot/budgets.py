"""Sparsity per block by outliers (OWL), and per layer by estimated loss.

OWL (Yin et al., 2023, arXiv 2310.05175): a weight is an outlier if |W_ij| ||x_j|| is more than 5 times the mean of its
block. Blocks with more outliers lose fewer weights. The sparsities stay within a bounded distance, and the total number
of pruned weights equals uniform sparsity.

Saliency: all weights of a model are ranked together by a score comparable across layers.

    s_ij = |W_ij| ||x_j|| ||g_i||        x_j: values of input j, g_i: gradients of the loss at output i, over all tokens

s squared is twice the second-order increase of the loss when W_ij is pruned, if gradients of tokens are independent of
each other and of the inputs: the diagonal of the Fisher information in Kronecker factors, as in LLM Surgeon (van der
Ouderaa et al., 2023, arXiv 2312.17244). Within a row it is Wanda's score; between rows and layers it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from pst_ds.core.keys import HIGHEST_FINITE, order_keys
from pst_ds.core.one_shot.scored import wanda_scores

STANDS_OUT = 5.0
"""Multiple of a block's mean score above which a weight is an outlier (the paper's M)."""
SPREAD = 0.08
"""Largest distance of a block's sparsity from the mean (the paper's lambda)."""


def outlier_share(scores: Callable[[], Iterator[Tensor]], multiple: float = STANDS_OUT) -> float:
    """Return the fraction of a block's weights whose score is more than ``multiple`` times the mean of the block.

    ``scores`` is called twice and yields the block's fp32 scores, at least 0. Raises FloatingPointError.
    """
    total, number = 0.0, 0
    for part in scores():
        total, number = total + float(part.sum(dtype=torch.float64)), number + part.numel()
    if not math.isfinite(total):
        raise FloatingPointError("scores are not finite")
    return sum(int((part > multiple * total / number).sum()) for part in scores()) / number


def zeros_by_outliers(outliers: Sequence[float], count: int, size: int, spread: float = SPREAD) -> list[int]:
    """Return how many of ``size`` weights each of several layers loses, ``count`` on average, from their ``outliers``.

    A layer with more outliers than the mean loses proportionally fewer weights. The furthest loses floor(``spread`` *
    size) fewer or more than ``count``, but never all. Among equal remainders, the first layers lose one more.
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


LEAST_KEPT = 0.05
"""Fraction of the weights that every layer keeps."""
_DROPPED_BITS = 16
"""Low bits of a score's fp32 representation that are ignored; the others distinguish scores that differ by 1 %."""
BINS = (HIGHEST_FINITE >> _DROPPED_BITS) + 1


def saliency_scores(weight: Tensor, inputs: Tensor, outputs: Tensor, *, transposed: bool = False) -> Tensor:
    """Return |W_ij| ||x_j|| ||g_i||: fp32 in the stored shape of ``weight``, (O, I), or (I, O) if ``transposed``.

    ``inputs`` (I,) and ``outputs`` (O,): the norms, over all calibration tokens.
    """
    of_outputs = outputs.to(weight.device, torch.float32)
    scores = wanda_scores(weight, inputs, transposed=transposed)
    return scores.mul_(of_outputs if transposed else of_outputs.unsqueeze(1))


def score_histogram(scores: Tensor) -> Tensor:
    """Return how many ``scores``, fp32 and at least 0, fall into each of :data:`BINS` bins: (BINS,) int64.

    Raises FloatingPointError for scores that are not finite.
    """
    keys = order_keys(scores)
    if bool((keys > HIGHEST_FINITE).any()) or bool((keys < 0).any()):
        raise FloatingPointError("scores are not finite")
    return torch.bincount((keys >> _DROPPED_BITS).flatten(), minlength=BINS)


def zeros_by_saliency(
    histograms: Sequence[Tensor],
    wanted: int,
    sizes: Sequence[int],
    weights_each: Sequence[int],
    least_kept: float = LEAST_KEPT,
) -> list[int]:
    """Return how many of its ``sizes`` units each layer loses if the ``wanted`` smallest scores of all are pruned.

    ``histograms``: :func:`score_histogram` of each layer. A unit of layer l has ``weights_each[l]`` weights, for
    example one per row. Every layer keeps at least ceil(``least_kept`` * size) units, and at least one; others then
    lose more. Together the layers lose at most ``wanted`` weights, and fall short by less than one unit of any layer
    that could lose another. Raises ValueError if they cannot lose that many.
    """
    most = [size - max(1, math.ceil(least_kept * size)) for size in sizes]
    caps = torch.tensor([n * each for n, each in zip(most, weights_each, strict=True)])
    if int(caps.sum()) < wanted:
        raise ValueError(f"{wanted} weights are to go, and {int(caps.sum())} can")
    upto = torch.minimum(torch.stack(list(histograms)).cumsum(1), caps.unsqueeze(1))  # (layers, BINS)
    cut = min(int(torch.searchsorted(upto.sum(0), wanted)), BINS - 1)
    below = upto[:, cut - 1] if cut else torch.zeros_like(caps)
    inside, left = upto[:, cut] - below, wanted - int(below.sum())
    share = left / max(1, int(inside.sum()))
    exact = [(b + share * i) / each for b, i, each in zip(below.tolist(), inside.tolist(), weights_each, strict=True)]
    found = [min(math.floor(one), n) for one, n in zip(exact, most, strict=True)]
    left = wanted - sum(n * each for n, each in zip(found, weights_each, strict=True))
    order = sorted(range(len(found)), key=lambda i: (found[i] - exact[i], i))
    for at_once in (1, max(sizes)):  # largest remainders first, then any layer with a unit that still fits
        for i in order:
            more = min(left // weights_each[i], most[i] - found[i], at_once)
            found[i], left = found[i] + more, left - more * weights_each[i]
    return found
