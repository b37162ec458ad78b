"""ALPS: optimise a mask and the weights under it by the alternating direction method of multipliers.

    minimise ||X W' - X W0'||^2    subject to the sparsity pattern of W        Meng et al., 2024, arXiv 2406.07831

SparseGPT decides once about every input, from first to last. ALPS reconsiders the whole matrix in every round: W
follows the outputs, D is W pruned to the pattern, and a growing penalty draws them together. When the mask has
settled, conjugate gradients find the best weights under it. H = X'X, (I, I), is the Gram matrix of a layer's inputs X
over all calibration tokens; O = out_features, I = in_features.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pst_ds.core.one_shot.gram import UnitGram, least_squares, regularised_inverse
from pst_ds.core.one_shot.scored import Compensated, joined
from pst_ds.core.one_shot.shares import ALONE, Ranks, Share, keep_in_panel, keep_together
from pst_ds.core.patterns import Pattern

# Fractions of H's diagonal. The penalty grows by equal factors, every few rounds as in the authors' schedule.
FIRST_PENALTY = 0.1
LAST_PENALTY = 1.0
# With 10 penalties of 3 rounds the errors of the layers of a 135M Llama are 0.5 % lower, and its loss by 0.003.
PENALTIES = 6
ROUNDS_PER_PENALTY = 4
GRADIENT_STEPS = 8
"""Steps from the last round's weights to the best under the mask."""


def alps(weight: Tensor, inputs: UnitGram, pattern: Pattern, sparsity: float) -> Compensated:
    """Prune one matrix (O, I): return its mask and the weights whose outputs are nearest to those of ``weight``.

    Raises ValueError for patterns that pool matrices, and FloatingPointError for a weight that is not finite.
    """
    share = Share.of(weight, pattern, sparsity)
    return alps_of_shares([share], inputs)[0]


def alps_of_shares(shares: Sequence[Share], inputs: UnitGram, ranks: Ranks = ALONE) -> list[Compensated]:
    """Prune matrices with the same ``inputs``; return mask and weights of this rank's rows. Collective over ``ranks``.

    Raises FloatingPointError, on all ranks, for a weight that is not finite.
    """
    for share in shares:
        share.require_finite()
    states: list[list[_Panel]] = []
    alone: list[tuple[list[_Panel], Share]] = []
    pooled: list[tuple[list[_Panel], Share]] = []
    for share in shares:
        panels = [_Panel(share.weight[rows], inputs) for rows in share.panels]
        states.append(panels)
        if share.ranks_rows_together:
            pooled.append((panels, share))
        else:
            alone.append((panels, share))
    growth = (LAST_PENALTY / FIRST_PENALTY) ** (1 / (PENALTIES - 1))
    penalties = [FIRST_PENALTY * growth**i for i in range(PENALTIES)]
    for penalty, inverse in _inverses(inputs.gram, penalties, ranks):
        turns = range(ROUNDS_PER_PENALTY)
        for panels, share in alone:
            for panel in panels:
                for _ in turns:  # all rounds of a panel while it is in the cache
                    panel.keep = keep_in_panel(panel.scores(penalty, inverse), share)
        if not pooled:
            continue
        for _ in turns:
            scores = []
            for panels, _ in pooled:
                scores.append([panel.scores(penalty, inverse) for panel in panels])
            # Collective, once per round: rows of different ranks compete, so a round needs the scores of all panels.
            kept = keep_together(scores, [share for _, share in pooled], ranks)
            for (panels, _), masks in zip(pooled, kept, strict=True):
                for panel, keep in zip(panels, masks, strict=True):
                    panel.keep = keep
    pruned = []
    for panels, share in zip(states, shares, strict=True):
        pruned.append(joined([panel.solution() for panel in panels], share))
    return pruned


class _Panel:
    """Rows of W and D. With penalty p, the multiplier of W = D is p (W - D): p W where pruned, 0 where kept."""

    def __init__(self, weight: Tensor, inputs: UnitGram):
        self._inputs = inputs
        self._shifted = (weight.to(torch.float32) * inputs.norms).contiguous()
        self._pulled = self._shifted @ inputs.gram
        self._penalty = 0.0
        self.keep = torch.ones(weight.shape, dtype=torch.uint8, device=weight.device)

    def scores(self, penalty: float, inverse: Tensor) -> Tensor:
        """Move W to the outputs and to D; return the scores of its weights."""
        kept = self._shifted * self.keep
        pruned = self._shifted.sub_(kept)
        pull = torch.add(self._pulled, kept, alpha=penalty).sub_(pruned, alpha=self._penalty)
        # in fp32: bf16 leaves noise where inputs have little energy, which the conjugate gradients do not remove
        self._shifted = pruned.mul_(self._penalty / penalty).addmm_(pull, inverse)
        self._penalty = penalty
        return (self._shifted * self._inputs.alive).square_()

    def solution(self) -> Compensated:
        """Return the mask and the best weights under it."""
        start = self._shifted.masked_fill_(self.keep == 0, 0.0)
        solved = least_squares(start, self.keep, self._pulled, gram=self._inputs.gram, steps=GRADIENT_STEPS)
        # W acted on inputs of norm 1 so far. The mask is applied once more, so that pruned weights are exactly +0.0.
        weight = (solved / self._inputs.norms).masked_fill_(self.keep == 0, 0.0)
        return Compensated(weight, self.keep)


def _inverses(gram: Tensor, penalties: Sequence[float], ranks: Ranks) -> Iterator[tuple[float, Tensor]]:
    """Yield each penalty and (gram + penalty * identity)^-1. Collective: each rank inverts the next of its turn."""
    for first in range(0, len(penalties), ranks.number):
        together = penalties[first : first + ranks.number]
        # A rank without a penalty in the last turn repeats the last one: a broadcast needs a tensor on every rank.
        inverse_here = regularised_inverse(gram, together[min(ranks.own, len(together) - 1)])
        for source, penalty in enumerate(together):
            yield penalty, ranks.broadcast(inverse_here, source)
