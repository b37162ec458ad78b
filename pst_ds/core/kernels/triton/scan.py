"""One rank's weights as arguments of the score kernels, and :mod:`pst_ds.core.bracket`'s passes over their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pst_ds.core.factors import Constants, TileFactors
from pst_ds.core.kernels.triton.bit_sums import BitsOfShard, MatrixBits, placed_bits
from pst_ds.core.kernels.triton.launch import blocks, launch, programs_of, upload
from pst_ds.core.layout import Rect, positions_before

_BLOCK_STEP = 1024


class KernelScans:
    """The same as ``_TorchScans`` in bracket.py, by kernels, each launched once for all matrices of a kind."""

    def __init__(self, matrices: Sequence[OwnKeys], brackets: Sequence[tuple[int, int]], rooms: Sequence[int]):
        """``brackets``: (low, high) per matrix. ``rooms``: most keys inside that are stored per matrix."""
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        self._matrices, self._device, table = matrices, matrices[0].values.device, Table(matrices)
        words = torch.tensor([blocks(n, 32 * kernels.WORDS) for n in (m.num_bits for m in matrices)])
        keys = torch.tensor([blocks(room, kernels.KEYS) for room in rooms])
        self._first_word = [kernels.WORDS * first for first in (words.cumsum(0) - words).tolist()]
        own = torch.tensor([m.own_bits for m in matrices])
        none = torch.zeros_like(words)
        columns = [words.cumsum(0) - words, keys.cumsum(0) - keys, torch.tensor(rooms), *own.unbind(1), none, none]
        numbers = torch.arange(len(matrices))
        tables = [
            torch.stack(columns, 1),
            numbers.repeat_interleave(words),
            numbers.repeat_interleave(keys),
            torch.tensor(brackets).view(-1, 2),
            own.diff(dim=1),
        ]
        sizes = [part.numel() for part in tables]
        there = upload(torch.cat([part.flatten() for part in tables]).int(), self._device).split(sizes)
        self._table, self._of_words, self._of_keys = there[0].view(-1, kernels.COLUMNS), there[1], there[2]
        num_words = int(words.sum()) * kernels.WORDS
        self.above, self.inside = torch.zeros(2, num_words, dtype=torch.int32, device=self._device)
        self._found = torch.zeros(len(matrices), 3, dtype=torch.int64, device=self._device)
        self._num_own, first_words = there[4], self._table[:, kernels.FIRST_WORDS].contiguous()
        table.sort(there[3], first_words, self.above, self.inside, self._found)
        self._index, self._keys = torch.empty(2, int(keys.sum()) * kernels.KEYS, dtype=torch.int32, device=self._device)
        launch(kernels.collect, (self._of_words.numel(),), self._table, self._of_words, self.inside, self._index)
        slots = self._table[:, kernels.FIRST_KEYS].long() * kernels.KEYS
        num_inside = self._table[:, kernels.NUM_INSIDE].contiguous()
        table.keys_at(rooms, slots, num_inside, self._index, self._keys)

    def counts(self) -> Tensor:
        from pst_ds.core.kernels.triton.cut_kernels import NUM_INSIDE, ROOM

        above, not_finite, inside = self._found.unbind(1)
        overflowed = self._table[:, NUM_INSIDE] > self._table[:, ROOM]
        return torch.stack([self._num_own - above - inside, not_finite, overflowed, inside], 1)

    def histograms(self, lows: Sequence[int], shift: int, bins: int) -> Tensor:
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        counts = torch.zeros(len(lows), bins, dtype=torch.int32, device=self._device)
        there = upload(torch.tensor(lows, dtype=torch.int64), self._device)
        args = (self._table, self._of_keys, self._keys, self._index, there, shift, counts)
        launch(kernels.histogram, (self._of_keys.numel(),), *args, BINS=bins)
        return counts.long()

    def decide(self, thresholds: Sequence[int], ties: Sequence[int]) -> list[Tensor]:
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        most = torch.iinfo(torch.int32).max
        cuts = torch.tensor([thresholds, [max(-most, min(n, most)) for n in ties]], dtype=torch.int32).t().contiguous()
        cuts = upload(cuts, self._device)
        equal = torch.zeros(max(1, self._of_words.numel()), dtype=torch.int32, device=self._device)
        keys = self._table, self._of_keys, self._keys, self._index, cuts
        launch(kernels.mark, (self._of_keys.numel(),), *keys, self.above, self.inside, equal)
        words = self._table, self._of_words, cuts, equal, self.inside, self.above
        launch(kernels.finish, (self._of_words.numel(),), *words, STEP=_BLOCK_STEP)
        return self.bits_of(self.above)

    def bits_of(self, words: Tensor) -> list[Tensor]:
        """Return the bits of each matrix's keys, from those of all in ``words``."""
        found = [words[first:].view(torch.uint8) for first in self._first_word]
        late = [i for i, m in enumerate(self._matrices) if m.lead and m.count]
        shards = []
        for i in late:
            count = self._matrices[i].count
            run = MatrixBits(found[i], Rect(0, 1, 0, count), count, lead=self._matrices[i].lead)
            shards.append(BitsOfShard(0, count, blocks(count, 8), [run]))
        for i, bits in zip(late, placed_bits(shards, self._device), strict=True):
            found[i] = bits
        return [bits[: blocks(m.count, 8)] for bits, m in zip(found, self._matrices, strict=True)]


_DEFAULTS = Constants()
_MOST = 1 << 30
"""Limit for int32 indices in the kernels, including those just beyond an edge."""


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """The weights of ``rect`` in ``values``, a flat run of a stored weight, with the factors that score them."""

    values: Tensor
    """(n,) W0, of at most 32 bits, from flat index ``start`` on; or int32 keys."""
    start: int
    row_length: int
    rect: Rect
    tile: TileFactors
    """Factors of the whole ``rect``, fp32."""
    constants: Constants = _DEFAULTS
    weight_scale: float = 1.0
    counted: tuple[int, int] | None = None
    """First and last + 1 of the positions in the matrix that this rank counts and samples, of keys; all if None."""

    @property
    def first(self) -> int:
        """Position of this rank's first weight among the matrix's weights, in storage order."""
        return positions_before(self.rect, self.row_length, self.start)

    @property
    def end(self) -> int:
        return positions_before(self.rect, self.row_length, self.start + self.values.numel())

    @property
    def count(self) -> int:
        return self.end - self.first

    @property
    def lead(self) -> int:
        """Bits before that of the first weight in its byte: bytes start where they do in the whole matrix."""
        return self.first % 8

    @property
    def num_bits(self) -> int:
        return self.lead + self.count if self.count else 0

    @property
    def width(self) -> int:
        return self.rect.c1 - self.rect.c0

    @property
    def rows(self) -> range:
        """Return the rows of the matrix that have weights of this rank."""
        return range(self.first // self.width, blocks(self.end, self.width) if self.count else 0)

    def num_tiles(self, rows: int, cols: int) -> int:
        return blocks(len(self.rows), rows) * blocks(self.width, cols)

    @property
    def own_bits(self) -> tuple[int, int]:
        """Return the first and the last + 1 bit of what this rank counts."""
        first, last = self.counted or (self.first, self.end)
        return first - self.first + self.lead, last - self.first + self.lead

    @property
    def fits(self) -> bool:
        """True if int32 indices suffice."""
        return self.values.numel() < _MOST and self.rect.numel < 2 * _MOST


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is equal for the matrices of a launch."""

    numbers: tuple[float, float, float]
    dtype: torch.dtype
    ranks: tuple[int, int]
    terms: int
    in_rows: bool
    aligned: tuple[bool, bool]

    def constants(self) -> dict[str, Any]:
        import triton.language as tl

        dtype = getattr(tl, str(self.dtype).removeprefix("torch."))
        return {"TYPE": dtype, "UPDATE_RANK": self.ranks[0], "SCORE_RANK": self.ranks[1], "TERMS": self.terms}


class Table:
    """Many matrices as rows of numbers in the memory of their device, to launch a kernel once for all of a kind."""

    def __init__(self, matrices: Sequence[OwnKeys]):
        self._matrices, self._device = matrices, matrices[0].values.device
        self._held = list[Tensor]()  # what the addresses in the table point to
        self._kinds: dict[_Kind, set[int]] = {}
        rows = [self._row(i, m) for i, m in enumerate(matrices)]
        self._rows = upload(torch.tensor(rows), self._device)

    def _row(self, number: int, own: OwnKeys) -> list[int]:
        """Return what the kernels read about a matrix, in the order of score_kernels.py; remember its kind."""
        from pst_ds.core.kernels.triton.score_kernels import TILE_ROWS

        tile, constants, rect = own.tile, own.constants, own.rect
        update = (None, None) if constants.frozen_magnitude else (tile.update_left, tile.update_right)
        pairs = [self._pair(*update), self._pair(tile.score_left, tile.score_right)]
        vectors = [
            None if v is None else v.float().contiguous()
            for v in (tile.score_rows, tile.score_cols, tile.row_norms, tile.col_norms)
        ]
        self._held += [own.values, *(v for v in vectors if v is not None)]
        offset = rect.r0 * own.row_length + rect.c0 - own.start
        weight = own.values.data_ptr() + offset * own.values.element_size()  # of the matrix's first, perhaps outside
        addresses = [0 if v is None else v.data_ptr() for v in vectors]
        by_col = [pair[3] for pair, _ in pairs] + addresses[1::2] + [4 * pair[4] for pair, _ in pairs]
        in_order = all(pair[2] == 1 for pair, rank in pairs if rank)
        starts_at_8 = not any(at % 8 for at in (own.row_length, own.first, own.end))
        aligned = in_order and not any(at % 16 for at in by_col), starts_at_8 and weight % 16 == 0
        terms = sum(1 << i for i, v in enumerate(vectors) if v is not None)
        numbers = constants.beta, constants.alpha1, constants.alpha2
        in_rows = own.width % 8 == 0 and own.values.is_floating_point()
        kind = _Kind(numbers, own.values.dtype, (pairs[0][1], pairs[1][1]), terms, in_rows, aligned)
        self._kinds.setdefault(kind, set()).add(number)
        factor = int(torch.tensor(1.0 / own.weight_scale, dtype=torch.float32).view(torch.int32))
        row = [weight, *pairs[0][0], *pairs[1][0], *addresses, factor, own.first, own.end]
        row += [*(own.counted or (own.first, own.end)), rect.r1 - rect.r0, own.width, own.row_length]
        return [*row, own.rows.start, blocks(len(own.rows), TILE_ROWS)]

    def _pair(self, left: Tensor | None, right: Tensor | None) -> tuple[list[int], int]:
        """Return the addresses and strides of a product, and its rank."""
        if left is None or right is None:
            return [0] * 5, 0
        right = right if right.stride(1) == 1 else right.contiguous()
        self._held += [left, right]
        return [left.data_ptr(), *left.stride(), right.data_ptr(), right.stride(0)], right.shape[0]

    def sort(self, brackets: Tensor, words: Tensor, above: Tensor, inside: Tensor, counts: Tensor) -> None:
        """Write the bits of the keys above and of those inside each bracket, and count them.

        ``brackets``: (matrices, 2) int32, low and high, both included. ``words``: (matrices,) int32, each one's first
        block of words in ``above`` and ``inside``. Adds {above, if any is not finite, inside} to ``counts``, int64.
        """
        from pst_ds.core.kernels.triton import cut_kernels
        from pst_ds.core.kernels.triton import score_kernels as kernels

        outputs = brackets, words, above.view(torch.uint8), inside.view(torch.uint8), counts
        sizes = {"WORD_BYTES": 4 * cut_kernels.WORDS}
        for kind, members in self._kinds.items():
            if kind.in_rows:
                aligned = dict(zip(("ALIGNED", "ALIGNED_WEIGHT"), kind.aligned, strict=True))
                tile = {"ROWS": kernels.TILE_ROWS, "COLS": kernels.TILE_COLS}
                tiles = {i: self._matrices[i].num_tiles(*tile.values()) for i in members}
                self._launch(kernels.bracket_rows, kind, tiles, *outputs, **sizes, **tile, **aligned)
            else:
                runs = {i: blocks(self._matrices[i].num_bits, kernels.FLAT) for i in members}
                self._launch(kernels.bracket_flat, kind, runs, *outputs, **sizes, SIZE=kernels.FLAT)

    def keys_at(self, sizes: Sequence[int], slots: Tensor, limits: Tensor, index: Tensor | None, keys: Tensor) -> None:
        """Write the keys of individual weights from ``slots``, (matrices,) int64, in ``keys`` on; 0 for those of other
        ranks.

        ``limits``: (matrices,), how many, at most ``sizes``. ``index``: the places of their bits; None
        for a sample.
        """
        from pst_ds.core.kernels.triton import score_kernels as kernels

        for kind, members in self._kinds.items():
            runs = {i: blocks(sizes[i], kernels.FLAT) for i in members}
            self._launch(kernels.keys_at, kind, runs, slots, limits, index, keys, SIZE=kernels.FLAT)

    def _launch(self, kernel: Any, kind: _Kind, programs: dict[int, int], *args: object, **constants: Any) -> None:
        """Launch so many ``programs`` for each matrix."""
        starts, matrix = programs_of([programs.get(i, 0) for i in range(len(self._matrices))], self._device)
        table = self._rows, starts, matrix, *kind.numbers
        launch(kernel, (len(matrix),), *table, *args, **kind.constants(), **constants)


def sample_keys(matrices: Sequence[OwnKeys], sizes: Sequence[int]) -> Tensor:
    """Return the keys of a sample of each matrix, one after another, (sum of sizes,) int32; 0 for other ranks' keys."""
    device = matrices[0].values.device
    slots = upload(torch.tensor([[0, *accumulate(sizes)][: len(sizes)], sizes]), device)
    keys = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
    Table(matrices).keys_at(sizes, slots[0], slots[1], None, keys)
    return keys
