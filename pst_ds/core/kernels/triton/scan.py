"""The passes of :mod:`pst_ds.core.bracket` over the keys of one rank's weights, by kernels."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pst_ds.core.kernels.triton.bit_sums import BitsOfShard, MatrixBits, placed_bits
from pst_ds.core.kernels.triton.launch import blocks, launch, upload
from pst_ds.core.kernels.triton.table import OwnKeys, Table
from pst_ds.core.layout import Rect

_BLOCK_STEP = 1024


class KernelScans:
    """The same as ``_TorchScans`` in bracket.py, by kernels, each launched once for all matrices of a kind."""

    def __init__(self, matrices: Sequence[OwnKeys], brackets: Sequence[tuple[int, int]], rooms: Sequence[int]):
        """``brackets``: (low, high) per matrix. ``rooms``: most keys inside that are stored per matrix."""
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        self._matrices = matrices
        self._device = matrices[0].values.device
        table = Table(matrices)
        # blocks of each matrix: of words of bits, and of keys inside
        words = torch.tensor([blocks(m.num_bits, 32 * kernels.WORDS) for m in matrices])
        keys = torch.tensor([blocks(room, kernels.KEYS) for room in rooms])
        first_words = words.cumsum(0) - words
        first_keys = keys.cumsum(0) - keys
        self._first_word = (kernels.WORDS * first_words).tolist()
        counted_bits = torch.tensor([m.own_bits for m in matrices])  # (matrices, 2)
        zero = torch.zeros_like(words)  # the kernels count here
        # in the order of the constants of cut_kernels.py
        columns = [first_words, first_keys, torch.tensor(rooms), *counted_bits.unbind(1), zero, zero]
        numbers = torch.arange(len(matrices))
        tables = [
            torch.stack(columns, 1),
            numbers.repeat_interleave(words),
            numbers.repeat_interleave(keys),
            torch.tensor(brackets).view(-1, 2),
            counted_bits.diff(dim=1),
        ]
        sizes = [part.numel() for part in tables]
        # one copy to the device for all tables
        uploaded = upload(torch.cat([part.flatten() for part in tables]).int(), self._device)
        table_numbers, self._of_words, self._of_keys, bracket_ends, self._num_own = uploaded.split(sizes)
        self._table = table_numbers.view(-1, kernels.COLUMNS)
        num_words = int(words.sum()) * kernels.WORDS
        self.above, self.inside = torch.zeros(2, num_words, dtype=torch.int32, device=self._device)
        self._counts = torch.zeros(len(matrices), 3, dtype=torch.int64, device=self._device)
        words_on_device = self._table[:, kernels.FIRST_WORDS].contiguous()
        _sort(table, bracket_ends, words_on_device, self.above, self.inside, self._counts)
        self._index, self._keys = torch.empty(2, int(keys.sum()) * kernels.KEYS, dtype=torch.int32, device=self._device)
        launch(kernels.collect, (self._of_words.numel(),), self._table, self._of_words, self.inside, self._index)
        slots = self._table[:, kernels.FIRST_KEYS].long() * kernels.KEYS
        num_inside = self._table[:, kernels.NUM_INSIDE].contiguous()
        _keys_at(table, rooms, slots, num_inside, self._index, self._keys)

    def counts(self) -> Tensor:
        from pst_ds.core.kernels.triton.cut_kernels import NUM_INSIDE, ROOM

        above, not_finite, inside = self._counts.unbind(1)
        overflowed = self._table[:, NUM_INSIDE] > self._table[:, ROOM]
        return torch.stack([self._num_own - above - inside, not_finite, overflowed, inside], 1)

    def histograms(self, lows: Sequence[int], shift: int, bins: int) -> Tensor:
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        counts = torch.zeros(len(lows), bins, dtype=torch.int32, device=self._device)
        lows_on_device = upload(torch.tensor(lows, dtype=torch.int64), self._device)
        args = (self._table, self._of_keys, self._keys, self._index, lows_on_device, shift, counts)
        launch(kernels.histogram, (self._of_keys.numel(),), *args, BINS=bins)
        return counts.long()

    def decide(self, thresholds: Sequence[int], ties: Sequence[int]) -> list[Tensor]:
        from pst_ds.core.kernels.triton import cut_kernels as kernels

        most = torch.iinfo(torch.int32).max
        # Ties are negative where lower ranks prune them all. A matrix here has at most ``most`` keys (OwnKeys.fits), so
        # numbers that are clamped to 32 bits decide in the same way.
        clamped = [max(-most, min(count, most)) for count in ties]
        cuts = torch.tensor([thresholds, clamped], dtype=torch.int32).t().contiguous()
        cuts = upload(cuts, self._device)
        equal = torch.zeros(max(1, self._of_words.numel()), dtype=torch.int32, device=self._device)
        keys = self._table, self._of_keys, self._keys, self._index, cuts
        launch(kernels.mark, (self._of_keys.numel(),), *keys, self.above, self.inside, equal)
        words = self._table, self._of_words, cuts, equal, self.inside, self.above
        launch(kernels.finish, (self._of_words.numel(),), *words, STEP=_BLOCK_STEP)
        return self.bits_of(self.above)

    def bits_of(self, words: Tensor) -> list[Tensor]:
        """Split ``words``, the bits of all matrices, by matrix."""
        bits_of_matrix = [words[first:].view(torch.uint8) for first in self._first_word]
        # Bits of these do not start at a byte's first bit: they are shifted to where their consumers expect them.
        late = [i for i, m in enumerate(self._matrices) if m.lead and m.count]
        shards = []
        for i in late:
            count = self._matrices[i].count
            run = MatrixBits(bits_of_matrix[i], Rect(0, 1, 0, count), count, lead=self._matrices[i].lead)
            shards.append(BitsOfShard(0, count, blocks(count, 8), [run]))
        for i, bits in zip(late, placed_bits(shards, self._device), strict=True):
            bits_of_matrix[i] = bits
        return [bits[: blocks(m.count, 8)] for bits, m in zip(bits_of_matrix, self._matrices, strict=True)]


def _sort(table: Table, brackets: Tensor, words: Tensor, above: Tensor, inside: Tensor, counts: Tensor) -> None:
    """Write the bits of the keys above and of those inside each bracket, and count them.

    ``brackets``: (matrices, 2) int32, low and high, both included. ``words``: (matrices,) int32, each one's first
    block of words in ``above`` and ``inside``. Adds {above, if any is not finite, inside} to ``counts``, int64.
    """
    from pst_ds.core.kernels.triton import cut_kernels
    from pst_ds.core.kernels.triton import score_kernels as kernels

    outputs = brackets, words, above.view(torch.uint8), inside.view(torch.uint8), counts
    sizes = {"WORD_BYTES": 4 * cut_kernels.WORDS}
    for kind, members in table.kinds.items():
        if kind.in_rows:
            factors_aligned, weights_aligned = kind.aligned
            aligned = {"ALIGNED": factors_aligned, "ALIGNED_WEIGHT": weights_aligned}
            tile = {"ROWS": kernels.TILE_ROWS, "COLS": kernels.TILE_COLS}
            tiles = {i: table.matrices[i].num_tiles for i in members}
            table.launch(kernels.bracket_rows, kind, tiles, *outputs, **sizes, **tile, **aligned)
        else:
            runs = {i: blocks(table.matrices[i].num_bits, kernels.FLAT) for i in members}
            table.launch(kernels.bracket_flat, kind, runs, *outputs, **sizes, SIZE=kernels.FLAT)


def _keys_at(
    table: Table, sizes: Sequence[int], slots: Tensor, limits: Tensor, index: Tensor | None, keys: Tensor
) -> None:
    """Write the keys of single weights to ``keys``, from ``slots``, (matrices,) int64, on; 0 if another rank has it.

    ``limits``: (matrices,), how many, at most ``sizes``. ``index``: the places of their bits; None for a sample.
    """
    from pst_ds.core.kernels.triton import score_kernels as kernels

    for kind, members in table.kinds.items():
        runs = {i: blocks(sizes[i], kernels.FLAT) for i in members}
        table.launch(kernels.keys_at, kind, runs, slots, limits, index, keys, SIZE=kernels.FLAT)


def sample_keys(matrices: Sequence[OwnKeys], sizes: Sequence[int]) -> Tensor:
    """Return the keys of a sample of each matrix, one after another, (sum of sizes,) int32; 0 for other ranks' keys."""
    device = matrices[0].values.device
    first_slots = [0, *accumulate(sizes)][: len(sizes)]
    slots = upload(torch.tensor([first_slots, sizes]), device)  # (2, matrices)
    keys = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
    _keys_at(Table(matrices), sizes, slots[0], slots[1], None, keys)
    return keys
