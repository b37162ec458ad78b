"""The rows of a matrix as shares of ranks, cut into panels whose heights do not depend on the number of ranks.

Given the statistics of a layer's inputs, each row of its matrix (O, I) can be pruned separately. A matrix product may
round differently for another number of rows, so every product has the rows of one panel, on any number of ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pst_ds.core.layout import Rect, WeightLayout
from pst_ds.core.patterns import Pattern
from pst_ds.core.select import MatrixKeys, RankSums, prune_count, select
from pst_ds.core.units import block_keys, expand_units, keep_in_rows, keep_n_of_m

MOST_ROWS = 128
"""Most rows of a panel: 128 x 2,048 fp32 numbers fill a core's cache."""
SHARES = 12
"""Panels that a matrix has at least, if each has :data:`LEAST_ROWS`: 1, 2, 3, 4, 6 and 12 ranks get equal shares."""
LEAST_ROWS = 16
"""Least rows of a panel, except for the last: products of fewer rows use a core badly."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that share rows, and their collectives; by default a single rank."""

    own: int = 0
    number: int = 1
    sums: RankSums = field(default_factory=RankSums)
    broadcast: Callable[[Tensor, int], Tensor] = lambda value, _source: value
    """Return the tensor of rank ``source``; all have its shape and dtype."""
    scatter: Callable[[Tensor], Tensor] = lambda rows: rows[0]
    """Return this rank's row of the sum over ranks of a tensor, (ranks, n)."""
    gather: Callable[[Tensor], Tensor] = lambda value: value.unsqueeze(0)
    """Return the tensors of all ranks, (ranks, *shape)."""

    def of_first(self, numbers: Tensor) -> Tensor:
        """Return the ``numbers`` of the first rank, on the CPU. Collective."""
        # The other ranks add zeros, so the sum is exact.
        summand = torch.zeros_like(numbers) if self.own else numbers
        return self.sums.all_sum(summand)


ALONE = Ranks()


def panels(outputs: int, unit: int = 1) -> list[slice]:
    """Cut rows 0 to ``outputs`` into panels of equal height, a multiple of ``unit``; the last may be lower."""
    height = min(MOST_ROWS, max(LEAST_ROWS, -(-outputs // SHARES)))
    height = -(-height // unit) * unit  # rounded up, so that no block of a pattern lies in two panels
    return [slice(first, min(first + height, outputs)) for first in range(0, outputs, height)]


@dataclass(frozen=True, slots=True)
class Share:
    """A matrix (O, I) to prune, of which this rank prunes the rows in ``panels``."""

    weight: Tensor
    """(O, I), all rows, in any float dtype."""
    pattern: Pattern
    sparsity: float
    panels: Sequence[slice]

    @classmethod
    def of(cls, weight: Tensor, pattern: Pattern, sparsity: float, ranks: Ranks = ALONE) -> "Share":
        """Return the share of ``ranks.own``: consecutive panels. Raises ValueError for a pattern that does not fit."""
        if pattern.pools_matrices:
            raise ValueError(
                f'pattern "{pattern}" ranks the weights of several matrices together; choose "matrix" or "row"'
            )
        pattern.require_fit(WeightLayout(*weight.shape))
        all_panels = panels(len(weight), pattern.outputs)
        first = len(all_panels) * ranks.own // ranks.number
        last = len(all_panels) * (ranks.own + 1) // ranks.number
        return cls(weight=weight, pattern=pattern, sparsity=sparsity, panels=all_panels[first:last])

    @property
    def rows(self) -> slice:
        """The rows of this rank."""
        if not self.panels:
            return slice(0, 0)
        return slice(self.panels[0].start, self.panels[-1].stop)

    @property
    def ranks_rows_together(self) -> bool:
        """True if weights of different rows compete, so that ranks have to exchange counts."""
        return self.pattern.kind in ("matrix", "block")

    def require_finite(self) -> None:
        """Raise FloatingPointError if a weight of any row is not finite, so on all ranks or none."""
        if not bool(torch.isfinite(self.weight).all()):
            raise FloatingPointError("weights are not finite")


def keep_in_panel(scores: Tensor, share: Share) -> Tensor:
    """Return the uint8 mask of a panel by its ``scores``, for a pattern that prunes each row separately.

    ``scores``: (rows, I) fp32, at least 0, so that their bits have their order.
    """
    keys = scores.view(torch.int32)
    if share.pattern.kind == "n:m":
        return keep_n_of_m(keys, (1, share.pattern.m), share.pattern.m - share.pattern.n)
    return keep_in_rows(keys, (1, keys.shape[1]), prune_count(share.sparsity, keys.shape[1]))


def keep_by_scores(scores: Sequence[Tensor], share: Share, ranks: Ranks) -> list[Tensor]:
    """Return the uint8 masks of this rank's panels of a matrix; ``scores``: as in :func:`keep_in_panel`. Collective."""
    if share.ranks_rows_together:
        return keep_together([scores], [share], ranks)[0]
    return [keep_in_panel(panel, share) for panel in scores]


def keep_together(scores: Sequence[Sequence[Tensor]], shares: Sequence[Share], ranks: Ranks) -> list[list[Tensor]]:
    """Return the uint8 masks of all panels, for patterns that rank rows together. Collective.

    ``scores``: of each share's panels, as in :func:`keep_in_panel`. Each matrix loses floor(sparsity * units) of its
    weights or blocks, over all ranks.
    """
    keys: list[list[Tensor]] = []
    matrices: list[MatrixKeys] = []
    for panel_scores, share in zip(scores, shares, strict=True):
        keys_of_share = [_unit_keys(panel, share) for panel in panel_scores]
        # Units of the whole matrix: the cut is the same on every rank, and a rank's own panels hold only a part.
        num_units = share.weight.numel() // (share.pattern.outputs * share.pattern.inputs)
        keys.append(keys_of_share)
        matrices.append(MatrixKeys(prune_count(share.sparsity, num_units), keys_of_share.__iter__))
    device = shares[0].weight.device if shares else torch.device("cpu")
    kept: list[list[Tensor]] = []
    # One selection for all matrices: the number of exchanges does not depend on how many there are.
    for cut, keys_of_share, share in zip(select(matrices, ranks.sums, device), keys, shares, strict=True):
        masks = cut.keep_all(keys_of_share)
        if share.pattern.kind == "block":
            masks = _expanded(masks, share)
        kept.append(masks)
    return kept


def _unit_keys(scores: Tensor, share: Share) -> Tensor:
    """Return int32 keys in the order of the ``scores``, which are at least 0: one per weight, or one per block."""
    keys = scores.view(torch.int32)
    if share.pattern.kind == "block":
        return block_keys(keys, (share.pattern.outputs, share.pattern.inputs))
    return keys


def _expanded(masks: Sequence[Tensor], share: Share) -> list[Tensor]:
    """Return masks with an entry per weight, given those with an entry per block, of the panels of a share."""
    unit = (share.pattern.outputs, share.pattern.inputs)
    expanded: list[Tensor] = []
    for mask, panel in zip(masks, share.panels, strict=True):
        rectangle = Rect(0, panel.stop - panel.start, 0, share.weight.shape[1])  # in the coordinates of the panel
        expanded.append(expand_units(mask, rectangle, unit))
    return expanded
