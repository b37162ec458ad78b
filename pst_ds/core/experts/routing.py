"""Assignment of tokens to experts, and the runs of rows after sorting by expert."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

ELEMENTS_AT_A_TIME = {"cpu": 1 << 19}
"""Numbers that :meth:`Routing.summed` reorders in one step; 2**24 on other devices."""


class Routing(NamedTuple):
    """Assignment of tokens to experts. A tuple, in which DeepSpeed's hooks find the tensors."""

    order: Tensor
    """(N*k,) int64: indices of the (token, expert) pairs, counted token by token, sorted by expert."""
    tokens: Tensor
    """(N*k,) int64: token of each of them."""
    experts: Tensor
    """(N*k,) int64: expert of each of them, increasing."""
    gates: Tensor
    """(N*k,): router weight of each of them, without its gradient."""
    counts: list[int]
    """Tokens per expert, for all E experts."""
    per_token: int
    """Experts per token (k)."""

    @classmethod
    def of(cls, index: Tensor, gates: Tensor, num_experts: int, *, even: bool = False) -> Routing:
        """Sort the pairs of ``index`` (N, k), the experts of each token, and their ``gates``.

        The host waits for the counts. With ``even`` they are as equal as possible instead, without reading ``index``.
        """
        experts, order = torch.sort(index.reshape(-1), stable=True)
        if even:
            borders = [expert * len(order) // num_experts for expert in range(num_experts + 1)]
            counts = [stop - start for start, stop in pairwise(borders)]
        else:
            counts = torch.bincount(experts, minlength=num_experts).tolist()
        per_token = index.shape[-1]
        return cls(order, order // per_token, experts, gates.detach().reshape(-1)[order], counts, per_token)

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has tokens, and the rows of its pairs."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def rows_of(self, x: Tensor, rows: slice, by_token: bool) -> Tensor:
        """Return rows of ``x``, which is (N, width) if ``by_token``, or (N*k, width) in the order of the experts."""
        return x[self.tokens[rows]] if by_token else x[rows]

    def summed(self, values: Tensor) -> Tensor:
        """Sum over the k experts of each token: (N*k, width) in the order of the experts to (N, width).

        The k terms are added in the order of the router's choice: bit-identical every time. Without a gradient,
        ``values`` are reordered in parts.
        """
        places = torch.arange(self.order.numel(), device=self.order.device)
        by_pair = torch.empty_like(places).scatter_(0, self.order, places).view(-1, self.per_token)
        # the gradient of each part would be as large as all values
        if torch.is_grad_enabled() and values.requires_grad:
            return values[by_pair].sum(1)
        out = values.new_empty(len(by_pair), values.shape[-1])
        step = max(1, ELEMENTS_AT_A_TIME.get(values.device.type, 1 << 24) // (self.per_token * values.shape[-1]))
        for start in range(0, len(by_pair), step):
            torch.sum(values[by_pair[start : start + step]], 1, out=out[start : start + step])
        return out
