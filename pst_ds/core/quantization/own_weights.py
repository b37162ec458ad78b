"""A rank's part of a stored weight: a flat run of values, or of codes that are expanded in tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.layout import Rect, view_in_shard
from pst_ds.core.quantization.coded import CodedRun


@dataclass(frozen=True, slots=True)
class OwnWeights:
    """The flat weights from ``start`` on of a stored weight with rows of ``row_length``."""

    values: Tensor | CodedRun
    """(n,). Slicing either type returns a tensor."""
    start: int
    row_length: int

    @property
    def stop(self) -> int:
        """Flat index after the last weight."""
        return self.start + self.values.numel()

    @property
    def device(self) -> torch.device:
        return self.values.device

    def rect(self, rect: Rect) -> Tensor:
        """Return a rectangle of the stored weight that is in this part, (rows, cols). Do not modify it."""
        if isinstance(self.values, CodedRun):
            return self.values.rect(rect)
        return view_in_shard(self.values, rect, self.row_length, self.start)

    def at(self, index: Tensor) -> Tensor:
        """Return individual weights by flat ``index`` in the stored weight, (n,) int64: (n,)."""
        if isinstance(self.values, CodedRun):
            return self.values.at(index)
        return self.values[index - self.start if self.start else index]

    def flat(self, first: int, last: int) -> Tensor:
        """Return the flat weights [first, last) of the stored weight, limited to this part: (n,)."""
        return self.values[max(0, first - self.start) : max(0, last - self.start)]
