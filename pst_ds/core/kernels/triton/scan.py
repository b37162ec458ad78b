"""One rank's weights as arguments of the score kernels, and :mod:`pst_ds.core.bracket`'s passes over their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pst_ds.core.factors import Constants, TileFactors
from pst_ds.core.kernels.triton.launch import blocks, launch
from pst_ds.core.layout import Rect, positions_before

_BLOCK_STEP = 1024


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy numbers from the host to ``device`` without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class KernelScans:
    """The same as ``_TorchScans`` in bracket.py, by kernels: three launches per matrix, few for all."""

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
        from pst_ds.core.kernels.triton.cut_kernels import ROOM

        above, not_finite, inside = self._found.unbind(1)
        return torch.stack([self._counts - above - inside, not_finite, inside > self._table[:, ROOM], inside], 1)

    def histograms(self, lows: Sequence[int], shift: int, bins: int) -> Tensor:
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        counts = torch.zeros(len(lows), bins, dtype=torch.int32, device=self._device)
        there = upload(torch.tensor(lows, dtype=torch.int64), self._device)
        args = (self._table, self._of_keys, self._keys, there, shift, counts)
        launch(kernels.histogram, (self._of_keys.numel(),), *args, BINS=bins)
        return counts.long()

    def decide(self, thresholds: Sequence[int], ties: Sequence[int]) -> list[Tensor]:
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        most = torch.iinfo(torch.int32).max
        cuts = torch.tensor([thresholds, [max(0, min(n, most)) for n in ties]], dtype=torch.int32).t().contiguous()
        cuts = upload(cuts, self._device)
        equal = torch.zeros(max(1, self._of_words.numel()), dtype=torch.int32, device=self._device)
        keys = self._table, self._of_keys, self._keys, self._index, cuts
        launch(kernels.mark, (self._of_keys.numel(),), *keys, self._above, self._inside, equal)
        words = self._table, self._of_words, cuts, equal, self._inside, self._above
        launch(kernels.finish, (self._of_words.numel(),), *words, STEP=_BLOCK_STEP)
        ends = zip(self._first_word, self._num_keys, strict=True)
        return [self._above[first:].view(torch.uint8)[: blocks(count, 8)] for first, count in ends]


_DEFAULTS = Constants()
_MOST = 1 << 30
"""Limit for int32 indices in the kernels, including those just beyond an edge."""


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """The weights of ``rect`` in ``values``, a flat run of a stored weight, with the factors that score them."""

    values: Tensor
    """(n,) W0, of at most 32 bits, from flat index ``start`` on."""
    start: int
    row_length: int
    rect: Rect
    tile: TileFactors
    """Factors of the whole ``rect``, fp32."""
    constants: Constants = _DEFAULTS
    weight_scale: float = 1.0

    @property
    def first(self) -> int:
        """Position of this rank's first weight among the matrix's weights, in storage order."""
        return positions_before(self.rect, self.row_length, self.start)

    @property
    def count(self) -> int:
        return positions_before(self.rect, self.row_length, self.start + self.values.numel()) - self.first

    @property
    def fits(self) -> bool:
        """True if int32 indices suffice."""
        return self.values.numel() < _MOST and self.rect.numel < 2 * _MOST

    @property
    def width(self) -> int:
        return self.rect.c1 - self.rect.c0

    def sort(self, bracket: Tensor, above: Tensor, inside: Tensor, counts: Tensor) -> None:
        """Write the bits of the keys above and of those inside a bracket, and count them.

        ``bracket``: int32 (low, high), both included. ``above``, ``inside``: uint8, at least ceil(count / 8) bytes.
        Adds {above, whether any key is not finite, inside} to ``counts``, int64.
        """
        from pst_ds.core.kernels.triton import score_kernels as kernels

        factors, constants = self._factors()
        row0, lead = divmod(self.first, max(1, self.width))
        if self.width == self.row_length and self.width % 8 == 0 and lead % 8 == 0:
            own = self.values[self.first + self._offset :]
            height = blocks(lead + self.count, self.width) if self.count else 0
            grid = blocks(height, kernels.TILE_ROWS), blocks(self.width, kernels.TILE_COLS)
            rows = self.rect.r1 - self.rect.r0
            launch(
                kernels.bracket_rows, grid, own, row0, lead, self.count, rows, self.width, *factors, bracket, above,
                inside, counts, ROWS=kernels.TILE_ROWS, COLS=kernels.TILE_COLS, **constants,
            )  # fmt: skip
            return
        launch(
            kernels.bracket_flat, (blocks(self.count, kernels.FLAT),), self.values, self.first, self.count, self.width,
            self.row_length, self._offset, *factors, bracket, above, inside, counts, SIZE=kernels.FLAT, **constants,
        )  # fmt: skip

    def keys_at(self, positions: Tensor, out: Tensor, *, base: int = 0, limit: Tensor | None = None) -> None:
        """Write the keys of the weights at ``base`` + ``positions`` to ``out``; 0 for other ranks' weights.

        ``positions``: (n,) int32 or int64. ``out``: (n,) int32; nothing is written from ``limit``, an int32 scalar, on.
        """
        from pst_ds.core.kernels.triton import score_kernels as kernels

        factors, constants = self._factors()
        size = positions.numel()
        launch(
            kernels.keys_at, (blocks(size, kernels.FLAT),), positions, size, limit, base, self.values, self.first,
            self.count, self.width, self.row_length, self._offset, *factors, out, SIZE=kernels.FLAT, **constants,
        )  # fmt: skip

    @property
    def _offset(self) -> int:
        """Index in ``values`` of the matrix's first weight, which may be outside."""
        return self.rect.r0 * self.row_length + self.rect.c0 - self.start

    def _factors(self) -> tuple[list[object], dict[str, Any]]:
        """Return the arguments of ``score`` in the kernels, and its constants."""
        tile, constants = self.tile, self.constants
        update = (None, None) if constants.frozen_magnitude else (tile.update_left, tile.update_right)
        scores = (tile.score_left, tile.score_right)
        vectors = [v if v is None else v.contiguous() for v in (tile.score_rows, tile.score_cols)]
        norms = [v if v is None else v.float().contiguous() for v in (tile.row_norms, tile.col_norms)]
        numbers = [constants.beta, 1.0 / self.weight_scale, constants.alpha1, constants.alpha2]
        update_rank, score_rank = (0 if pair[1] is None else pair[1].shape[0] for pair in (update, scores))
        arguments: list[object] = [*_pair(*update), *_pair(*scores), *vectors, *norms, *numbers]
        return arguments, {"UPDATE_RANK": update_rank, "SCORE_RANK": score_rank}


def _pair(left: Tensor | None, right: Tensor | None) -> list[object]:
    """Return the factors of a product with their strides."""
    if left is None or right is None:
        return [None, 0, 1, None, 0]
    right = right if right.stride(1) == 1 else right.contiguous()
    return [left, left.stride(0), left.stride(1), right, right.stride(0)]
