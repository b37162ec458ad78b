"""The passes of :mod:`pst_ds.core.bracket` over one rank's keys with kernels: three launches per matrix, few for
all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pst_ds.core.kernels.triton.launch import blocks, launch
from pst_ds.core.kernels.triton.own_keys import OwnKeys

_BLOCK_STEP = 1024
"""Blocks whose counts of equal keys are summed in one step."""


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy numbers from the host to ``device`` without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class KernelScans:
    """The keys of all matrices on this rank, classified by their brackets; bracket.py defines the interface."""

    def __init__(self, matrices: Sequence[OwnKeys], brackets: Sequence[tuple[int, int]], rooms: Sequence[int]):
        """``brackets``: (low, high) per matrix. ``rooms``: most keys inside that are stored per matrix."""
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        self._device = matrices[0].values.device
        self._num_keys = [m.count for m in matrices]
        words = torch.tensor([blocks(n, 32 * kernels.WORDS) for n in self._num_keys])
        keys = torch.tensor([blocks(room, kernels.KEYS) for room in rooms])
        self._first_word = [kernels.WORDS * first for first in (words.cumsum(0) - words).tolist()]
        first_key = [kernels.KEYS * first for first in (keys.cumsum(0) - keys).tolist()]
        columns = [words.cumsum(0) - words, keys.cumsum(0) - keys, torch.tensor(rooms), torch.zeros_like(words)]
        numbers = torch.arange(len(matrices))
        tables = [
            torch.stack(columns, 1),
            numbers.repeat_interleave(words),
            numbers.repeat_interleave(keys),
            torch.tensor(brackets).view(-1, 2),
            torch.tensor(self._num_keys),
        ]
        sizes = [table.numel() for table in tables]
        there = upload(torch.cat([table.flatten() for table in tables]).int(), self._device).split(sizes)
        self._table, self._of_words, self._of_keys = there[0].view(-1, kernels.COLUMNS), there[1], there[2]
        num_words = int(words.sum()) * kernels.WORDS
        self._above, self._inside = torch.zeros(2, num_words, dtype=torch.int32, device=self._device)
        found = torch.zeros(len(matrices), 3, dtype=torch.int64, device=self._device)
        for m, bracket, first, out in zip(matrices, there[3].view(-1, 2), self._first_word, found, strict=True):
            m.sort(bracket, self._above[first:].view(torch.uint8), self._inside[first:].view(torch.uint8), out)
        self._index, self._keys = torch.empty(2, int(keys.sum()) * kernels.KEYS, dtype=torch.int32, device=self._device)
        launch(kernels.collect, (self._of_words.numel(),), self._table, self._of_words, self._inside, self._index)
        for i, (m, first, room) in enumerate(zip(matrices, first_key, rooms, strict=True)):
            at = slice(first, first + room)
            m.keys_at(self._index[at], self._keys[at], base=m.first, limit=self._table[i, kernels.NUM_INSIDE])
        self._found, self._counts = found, there[4]

    def counts(self) -> Tensor:
        """Return (matrices, 4) int64, as :meth:`pst_ds.core.keys.Classifier.counts`, except that "not finite" is 0
        or 1.
        """
        from pst_ds.core.kernels.triton.cut_kernels import ROOM

        above, not_finite, inside = self._found.unbind(1)
        return torch.stack([self._counts - above - inside, not_finite, inside > self._table[:, ROOM], inside], 1)

    def histograms(self, lows: Sequence[int], shift: int, bins: int) -> Tensor:
        """Return (matrices, bins) int64 of the keys inside, as :func:`pst_ds.core.keys.histogram` with the low of
        each.
        """
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        counts = torch.zeros(len(lows), bins, dtype=torch.int32, device=self._device)
        there = upload(torch.tensor(lows, dtype=torch.int64), self._device)
        args = (self._table, self._of_keys, self._keys, there, shift, counts)
        launch(kernels.histogram, (self._of_keys.numel(),), *args, BINS=bins)
        return counts.long()

    def decide(self, thresholds: Sequence[int], ties: Sequence[int]) -> list[Tensor]:
        """Return the kept bits of each matrix: keys above its threshold, and equal keys except the first ``ties``. Call
        once.
        """
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        most = torch.iinfo(torch.int32).max
        cuts = torch.tensor([thresholds, [max(0, min(n, most)) for n in ties]], dtype=torch.int32).t().contiguous()
        cuts = upload(cuts, self._device)
        equal = torch.zeros(max(1, self._of_words.numel()), dtype=torch.int32, device=self._device)
        launch(
            kernels.mark,
            (self._of_keys.numel(),),
            self._table,
            self._of_keys,
            self._keys,
            self._index,
            cuts,
            self._above,
            self._inside,
            equal,
        )
        launch(
            kernels.finish,
            (self._of_words.numel(),),
            self._table,
            self._of_words,
            cuts,
            equal,
            self._inside,
            self._above,
            STEP=_BLOCK_STEP,
        )
        ends = zip(self._first_word, self._num_keys, strict=True)
        return [self._above[first:].view(torch.uint8)[: blocks(count, 8)] for first, count in ends]
