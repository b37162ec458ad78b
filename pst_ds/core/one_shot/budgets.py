"""Sparsity per layer by estimated loss.

All weights of a model are ranked together by a score comparable across layers.

    s_ij = |W_ij| ||x_j|| ||g_i||        x_j: values of input j, g_i: gradients of the loss at output i, over all tokens

s squared is twice the second-order increase of the loss when W_ij is pruned, if gradients of tokens are independent of
each other and of the inputs: the diagonal of the Fisher information in Kronecker factors, as in LLM Surgeon (van der
Ouderaa et al., 2023, arXiv 2312.17244). Within a row it is Wanda's score; between rows and layers it is not.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pst_ds.core.keys import HIGHEST_FINITE, order_keys
from pst_ds.core.one_shot.scored import wanda_scores

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
    if not transposed:
        of_outputs = of_outputs.unsqueeze(1)  # (O, 1): outputs are the rows
    return wanda_scores(weight, inputs, transposed=transposed).mul_(of_outputs)


def score_histogram(scores: Tensor) -> Tensor:
    """Return how many ``scores``, fp32 and at least 0, fall into each of :data:`BINS` bins: (BINS,) int64.

    Raises FloatingPointError for scores that are not finite.
    """
    keys = order_keys(scores)
    if bool((keys > HIGHEST_FINITE).any()) or bool((keys < 0).any()):
        raise FloatingPointError("scores are not finite")
    # keys of numbers from 0 on are their fp32 bits, so the high bits are the exponent and the first of the fraction
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
    inside = upto[:, cut] - below
    # The cut's bin is shared out: every layer loses the same fraction of its scores in this bin.
    left = wanted - int(below.sum())
    share = left / max(1, int(inside.sum()))
    exact = []
    lost = []
    for i, each in enumerate(weights_each):
        units = (below[i].item() + share * inside[i].item()) / each
        exact.append(units)
        lost.append(min(math.floor(units), most[i]))
    left = wanted - sum(n * each for n, each in zip(lost, weights_each, strict=True))
    order = sorted(range(len(lost)), key=lambda i: (lost[i] - exact[i], i))  # equal remainders: the first layer
    for at_once in (1, max(sizes)):  # largest remainders first, then any layer with a unit that still fits
        for i in order:
            more = min(left // weights_each[i], most[i] - lost[i], at_once)
            lost[i] = lost[i] + more
            left = left - more * weights_each[i]
    return lost
