"""Assignment of tokens to experts, and the runs of rows after sorting by expert."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor

ELEMENTS_AT_A_TIME = {"cpu": 1 << 19}
"""Numbers that :meth:`Routing.summed` reorders in one step; 2**24 on other devices."""
_kept_numbers: dict[torch.device, Tensor] = {}
"""0, 1, 2, ... on each device, as many as any layer has needed."""


class Routing(NamedTuple):
    """Assignment of tokens to experts. A tuple, in which DeepSpeed's hooks find the tensors."""

    order: Tensor
    """(N*k,) int64: indices of the (token, expert) pairs, counted token by token, sorted by expert."""
    places: Tensor
    """(N, k) int64: the inverse, which row in this order each pair has."""
    experts: Tensor
    """(N*k,) int64: expert of each row, increasing."""
    weights: Tensor
    """(N, k): router weights, without their gradient."""
    ends: Tensor
    """(E,) int32: the row behind the last of each expert."""
    counts: list[int] | None
    """Tokens per expert, where the host knows them: on the CPU."""

    @classmethod
    def of(cls, index: Tensor, weights: Tensor, num_experts: int, *, even: bool = False) -> Self:
        """Sort the pairs of ``index`` (N, k), the experts of each token, with their router ``weights``.

        The host does not wait for another device. With ``even``, ``counts`` are as equal as possible instead, without
        reading ``index``.
        """
        # Stable, so that an expert's rows are in the order of the tokens, and sums over them the same every time.
        experts, order = torch.sort(index.reshape(-1), stable=True)
        ends = torch.searchsorted(experts, _numbers(num_experts, index.device), right=True, out_int32=True)
        rows = _numbers(order.numel(), index.device)
        places = torch.empty_like(order).scatter_(0, order, rows).view(index.shape)
        counts = None
        if even:
            borders = [expert * len(order) // num_experts for expert in range(num_experts + 1)]
            counts = [stop - start for start, stop in pairwise(borders)]
        elif index.device.type == "cpu":
            counts = _counts(ends).tolist()
        return cls(order, places, experts, weights.detach(), ends, counts)

    @property
    def tokens(self) -> Tensor:
        """(N*k,) int64: token of each row."""
        return self.order // self.places.shape[1]

    @property
    def tokens_of_experts(self) -> Tensor:
        """(E,) int32: tokens of each expert."""
        return _counts(self.ends)

    @property
    def gates(self) -> Tensor:
        """(N*k,): router weight of each row."""
        return self.weights.reshape(-1)[self.order]

    def runs(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has tokens, and the rows of its pairs. The host waits for a device other than CPUs."""
        start = 0
        counts = self.counts
        if counts is None:
            counts = _counts(self.ends).tolist()
        for expert, count in enumerate(counts):
            if count:
                yield expert, slice(start, start + count)
            start += count

    def rows_of(self, x: Tensor, rows: slice, by_token: bool) -> Tensor:
        """Return rows of ``x``, which is (N, width) if ``by_token``, or (N*k, width) in the order of the experts."""
        if not by_token:
            return x[rows]
        tokens = self.order[rows] // self.places.shape[1]  # pairs are counted token by token
        return x[tokens]

    def sorted_rows(self, x: Tensor) -> Tensor:
        """Return (N*k, width) in the order of the experts from ``x`` (N, width), without gradient."""
        out = x.new_empty(self.order.numel(), x.shape[1])
        out[self.places] = x.unsqueeze(1)
        return out

    def combined(self, values: Tensor, weights: Tensor) -> Tensor:
        """Sum ``values`` times ``weights`` (N, k) over the k experts of each token, see :meth:`summed`."""
        if values.device.type == "cpu":
            return self.summed(values * weights.reshape(-1)[self.order].unsqueeze(-1))
        by_pair = values.index_select(0, self.places.view(-1)).view(*self.places.shape, -1)  # (N, k, width)
        return torch.bmm(weights.to(values.dtype).unsqueeze(1), by_pair).squeeze(1)

    def summed(self, values: Tensor) -> Tensor:
        """Sum over the k experts of each token: (N*k, width) in the order of the experts to (N, width).

        The k terms are added in the order of the router's choice: bit-identical every time. Without a gradient,
        ``values`` are reordered in parts.
        """
        # In parts, autograd would keep a gradient of the size of all values for each of them.
        if torch.is_grad_enabled() and values.requires_grad:
            return values[self.places].sum(1)
        out = values.new_empty(len(self.places), values.shape[-1])
        step = max(1, ELEMENTS_AT_A_TIME.get(values.device.type, 1 << 24) // (self.places.shape[1] * values.shape[-1]))
        for start in range(0, len(out), step):
            torch.sum(values[self.places[start : start + step]], 1, out=out[start : start + step])
        return out


def _numbers(count: int, device: torch.device) -> Tensor:
    """Return 0, 1, ..., ``count`` - 1, kept on an accelerator for the next layers. Do not modify them."""
    kept = _kept_numbers.get(device)
    if kept is None or len(kept) < count:
        # A tensor that is made in inference mode could not be saved for a backward pass later.
        with torch.inference_mode(False):
            kept = torch.arange(count, device=device)
        # A trace computes on these two, and its tensors must not outlive it.
        if device.type not in ("cpu", "meta"):
            _kept_numbers[device] = kept
    return kept[:count]


def _counts(ends: Tensor) -> Tensor:
    """Return the rows of each expert from the row behind its last."""
    return ends.diff(prepend=ends.new_zeros(1))
