"""Importance scores as integers of the same order, and what selection does with runs of such keys.

A key is an int32 that orders like an fp32 score, with -0 equal to +0. On CPUs the loops are native code
(:mod:`pst_ds.core.kernels`). On other devices, and without a compiler, torch computes bit-identical results.
"""

from collections.abc import Callable, Sequence
from ctypes import CDLL
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pst_ds.core.bits import NATIVE_DTYPES, pack_shard
from pst_ds.core.factors import Constants, TileFactors
from pst_ds.core.kernels import library
from pst_ds.core.layout import runs_of
from pst_ds.core.scores import importance

# Keys of the smallest and the largest finite score.
LOWEST_FINITE = -0x7F800000
HIGHEST_FINITE = 0x7F7FFFFF
_MORE_ROOM = 16
"""Spare elements at the end of a buffer: the native loop writes whole vectors."""
_COUNTED_AT_ONCE = 1 << 22
"""Keys that torch counts in one call, on devices other than CPUs."""
MOST_AT_ONCE = 1 << 22
"""Most keys of one matrix held at once on a CPU. Larger matrices are read in tiles (:mod:`pst_ds.core.bracket`)."""
NO_KEY = -(1 << 31)
"""Placeholder for a missing key, below the key of every finite score."""


def order_keys(scores: Tensor) -> Tensor:
    """Return int32 keys that order like the fp32 ``scores``, with -0 equal to +0."""
    bits = scores.add(0.0).contiguous().view(torch.int32)  # -0.0 + 0.0 is +0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def scores_of_keys(keys: Tensor) -> Tensor:
    """Return the fp32 scores of the given keys."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def native_for(*tensors: Tensor) -> CDLL | None:
    """Return the native loops if all tensors are on the CPU, and the loops can be compiled or are installed."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    return library()


def score_keys(weight: Tensor, tile: TileFactors, constants: Constants, weight_scale: float = 1.0) -> Tensor:
    """Return order_keys(importance(...)) of one rectangle, (rows, cols) int32, bit-identical for any rectangle.

    ``weight``: W0, (rows, cols). Fastest if the rows of the weight, of V and of B are contiguous.
    """
    native = None
    if weight.dtype in NATIVE_DTYPES and weight.stride(1) == 1 and tile.update is None:
        native = native_for(weight, *tile.held().values())
    if native is None:
        return order_keys(importance(weight, tile, constants, weight_scale))
    out = torch.empty(weight.shape, dtype=torch.int32)
    numbers = torch.tensor([constants.beta, 1.0 / weight_scale, constants.alpha1], dtype=torch.float32)
    update = _product(tile.update_left, tile.update_right)
    if constants.frozen_magnitude:  # |W0| without its update
        update = _product(None, None)
    # The loop takes None for a term that the scores do not have.
    terms: list[Tensor | None] = []
    for scores in (tile.score_rows, tile.score_cols):
        terms.append(_optional(scores, lambda term: (term * constants.alpha2).contiguous()))
    for norms in (tile.row_norms, tile.col_norms):
        terms.append(_optional(norms, lambda term: term.float().contiguous()))
    native.pst_score_keys(
        weight, NATIVE_DTYPES[weight.dtype], weight.stride(0), *weight.shape, *update,
        *_product(tile.score_left, tile.score_right), *terms, numbers, out,
    )  # fmt: skip
    return out


def _optional(term: Tensor | None, prepare: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Return ``term`` prepared for the native loop, if there is one."""
    if term is None:
        return None
    return prepare(term)


def _product(left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None, int, Tensor]:
    """Return the arguments of a low-rank product for the native loop: left, right, rank, strides."""
    if left is None or right is None:
        return None, None, 0, torch.zeros(3, dtype=torch.int64)
    # The loop reads rows of the right factor as vectors.
    if right.stride(1) != 1:
        right = right.contiguous()
    return left, right, right.shape[0], torch.tensor([*left.stride(), right.stride(0)])


@dataclass(frozen=True, slots=True)
class SingleWeights:
    """Individual weights of one matrix, with the factors that score them."""

    weight: Tensor
    """W0, (n, 1)."""
    tile: TileFactors
    """Factors of n rectangles of one weight each, in a column: right factors have one entry per weight."""
    constants: Constants
    weight_scale: float

    @property
    def kind(self) -> object:
        """Return a value that is equal for weights which :func:`keys_of` can score in one call."""
        held = self.tile.held()
        # Factors of different ranks cannot be concatenated.
        ranks = [held[name].shape[0] for name in ("score_right", "update_right") if name in held]
        return self.constants, self.weight.dtype, *held, *ranks


def single_weights(
    weight: Tensor, rows: Tensor, cols: Tensor, tile: TileFactors, constants: Constants, weight_scale: float = 1.0
) -> SingleWeights:
    """Select from the factors ``tile`` of a rectangle those that score ``weight``, (n,) W0 at (rows[i], cols[i])."""
    single: dict[str, Any] = {}
    for name, values in tile.held().items():
        if name in ("score_right", "score_cols", "update_right"):
            single[name] = values[..., cols].unsqueeze(-1)
        elif name == "col_norms":
            # In a column of weights, the norm of a weight's input belongs to its row.
            single["row_norms"] = values[cols]
        else:
            single[name] = values[rows]
    return SingleWeights(weight.unsqueeze(1), TileFactors(**single), constants, weight_scale)


def keys_of(singles: Sequence[SingleWeights]) -> list[Tensor]:
    """Return the keys of individual weights per matrix, (n,) int32. On a GPU, weights of one kind share launches."""
    kinds: dict[object, list[int]] = {}
    for i, single in enumerate(singles):
        kinds.setdefault(single.kind, []).append(i)
    keys: dict[int, Tensor] = {}
    for members in kinds.values():
        together = [singles[i] for i in members]
        sizes = [single.weight.shape[0] for single in together]
        keys.update(zip(members, _keys_together(together).split(sizes), strict=True))
    return [keys[i] for i in range(len(singles))]


def _keys_together(singles: Sequence[SingleWeights]) -> Tensor:
    """Return the keys of individual weights of one kind, matrix after matrix: (n,) int32."""
    first = singles[0]
    if len(singles) == 1:
        return order_keys(importance(first.weight, first.tile, first.constants, first.weight_scale)).squeeze(1)
    parts = [single.tile.held() for single in singles]
    tile: dict[str, Any] = {}
    for name in parts[0]:
        along = 0
        if name.endswith("_right"):  # a column per weight; all others have a row
            along = 1
        tile[name] = torch.cat([part[name] for part in parts], along)
    # The scale of a matrix, once per weight: weights of several matrices are in one tensor.
    factors: list[Tensor] = []
    for single in singles:
        weight = single.weight
        factors.append(weight.new_full(weight.shape, 1.0 / single.weight_scale, dtype=torch.float32))
    weight = torch.cat([single.weight for single in singles])
    return order_keys(importance(weight, TileFactors(**tile), first.constants, factors=torch.cat(factors))).squeeze(1)


class Classifier:
    """Classifies the keys of one matrix as above, below or inside an interval, and stores the few that are inside.

    :meth:`take` receives all ``num_keys`` keys, in increasing order of their weights. At most ``room`` keys inside are
    stored. On a GPU no size depends on the keys, so the host never waits.
    """

    def __init__(self, num_keys: int, low: int, high: int, *, room: int, device: torch.device):
        self.low = low
        self.high = high
        self._room = room
        self._taken = 0
        self._above = torch.empty(num_keys, dtype=torch.uint8, device=device)
        self._native = None
        length = 0
        if device.type == "cpu":
            self._native = library()
        if self._native is not None:
            length = room + _MORE_ROOM
        self._index_dtype = torch.int64
        if num_keys < 1 << 31:  # half of the memory
            self._index_dtype = torch.int32
        self._numbers: list[Any] = [0, 0, 0]  # below, inside, not finite; tensors off the CPU
        self._keys = torch.empty(length, dtype=torch.int32, device=device)
        self._index = torch.empty(length, dtype=torch.int32, device=device)
        self._tiles: list[tuple[int, int]] = []  # (keys inside, keys) before each tile that has a separate index
        self._pieces: list[tuple[Tensor, Tensor]] = []  # of both, from each tile, without the native loop

    def take(self, keys: Tensor) -> None:
        """Classify the next ``keys``, (n,) int32."""
        above = self._above[self._taken : self._taken + keys.numel()]
        if self._native is None:
            self._sort(keys, above)
        else:
            self._sort_natively(self._native, keys.contiguous(), above)
        self._taken += keys.numel()

    def _sort_natively(self, native: CDLL, keys: Tensor, above: Tensor) -> None:
        """Classify ``keys``, and write to ``above`` which are above the interval."""
        counts = torch.zeros(3, dtype=torch.int64)
        stored = min(self._numbers[1], self._room)
        first = self._taken
        if self._index_dtype == torch.int64:
            # The loop writes 32 bits, so it counts from the tile's first key, which is added in the end.
            self._tiles.append((stored, first))
            first = 0
        native.pst_classify(
            keys, keys.numel(), self.low, self.high, first, above, self._keys[stored:], self._index[stored:],
            self._room - stored, counts,
        )  # fmt: skip
        for i, more in enumerate(counts.tolist()):
            self._numbers[i] += more

    def _sort(self, keys: Tensor, above: Tensor) -> None:
        """Do the same in torch, without a size that depends on the keys."""
        torch.gt(keys, self.high, out=above)
        dtype = self._index_dtype
        running = ((keys >= self.low) & (keys <= self.high)).cumsum(0, dtype=dtype)
        places = torch.arange(1, min(self._room, keys.numel()) + 1, dtype=dtype, device=keys.device)
        # The place of the k-th key inside is the first at which the running count is k. A boolean index would find
        # them with a size that depends on the keys, for which the host would wait.
        index = torch.searchsorted(running, places, out_int32=dtype == torch.int32)
        is_none = index >= keys.numel()
        index.clamp_(max=max(0, keys.numel() - 1))
        inside = keys.index_select(0, index).masked_fill_(is_none, NO_KEY)
        if self._taken:
            index = index + self._taken
        self._pieces.append((inside, index))
        bad = ((keys < LOWEST_FINITE) | (keys > HIGHEST_FINITE)).sum()
        # The last running count, also of no keys at all.
        counts = [(keys < self.low).sum(), running[-1:].sum(), bad]
        if self._taken:
            counts = [total + more for total, more in zip(self._numbers, counts, strict=True)]
        self._numbers = counts

    def counts(self) -> Tensor:
        """Return (4,) int64: keys below; keys that are not finite; 1 if ``room`` was exceeded; keys inside."""
        below, inside, not_finite = self._numbers
        numbers = [below, not_finite, inside > self._room, inside]
        if isinstance(inside, int):
            return torch.tensor([int(number) for number in numbers], device=self._above.device)
        return torch.stack(numbers)

    def above(self) -> Tensor:
        """Return which keys are above the interval, (num_keys,) uint8 0/1."""
        assert self._taken == self._above.numel(), f"{self._taken} keys came, not {self._above.numel()}"
        return self._above

    def inside(self) -> tuple[Tensor, Tensor]:
        """Return the keys inside and their indices among all keys, (n,) each, in increasing order.

        Both are int32; indices are int64 for 2**31 keys or more. If ``room`` was exceeded, some or all are missing. On
        a GPU the result contains some :data:`NO_KEY`.
        """
        if self._native is None:
            if len(self._pieces) == 1:
                return self._pieces[0]
            # Empty tensors first, for the case that no keys came.
            keys = [self._keys]
            places = [self._index]
            for keys_of_tile, places_of_tile in self._pieces:
                keys.append(keys_of_tile)
                places.append(places_of_tile)
            return torch.cat(keys), torch.cat(places)
        stored = self._numbers[1]
        if stored > self._room:  # the buffer lacks some, so none is of use
            stored = 0
        index = self._index[:stored].to(self._index_dtype, copy=True)
        for (first, before), (last, _) in pairwise([*self._tiles, (stored, 0)]):
            index[first:last] += before
        return self._keys[:stored].clone(), index


def histogram(keys: Tensor, low: int, shift: int, bins: int) -> Tensor:
    """Return the counts of (key - low) >> shift for the keys in [low, low + (bins << shift)): (bins,) int64."""
    native = native_for(keys)
    if native is not None and keys.is_contiguous():
        counts = torch.zeros(bins, dtype=torch.int64)
        native.pst_histogram(keys, keys.numel(), low, shift, bins, counts)
        return counts
    return _torch_histograms([keys.flatten()], [low], shift, bins)[0]


def histograms(keys: Sequence[Tensor], lows: Sequence[int], shift: int, bins: int) -> Tensor:
    """Return :func:`histogram` of every run of ``keys``, (n,) int32 each, with its low: (runs, bins) int64."""
    if native_for(*keys) is not None:
        return torch.stack([histogram(run, low, shift, bins) for run, low in zip(keys, lows, strict=True)])
    counts: list[Tensor] = []
    for part in runs_of([run.numel() for run in keys], _COUNTED_AT_ONCE):
        runs = slice(part.start, part.stop)
        counts.append(_torch_histograms(keys[runs], lows[runs], shift, bins))
    if len(counts) == 1:
        return counts[0]
    return torch.cat(counts)


def _torch_histograms(keys: Sequence[Tensor], lows: Sequence[int], shift: int, bins: int) -> Tensor:
    """Return the counts of every run, (runs, bins) int64. Keys outside have bins, so that the host does not wait."""
    digits = torch.cat(list(keys)).long()
    counts = torch.zeros(len(keys), bins + 2, dtype=torch.int64, device=digits.device)
    runs = digits.split([run.numel() for run in keys])
    one = counts.new_ones(())
    for run, low in zip(runs, lows, strict=True):
        run.sub_(low)
    # Bin 0 is for keys below, the last for keys above.
    digits.bitwise_right_shift_(shift).clamp_(-1, bins).add_(1)
    for run, out in zip(runs, counts, strict=True):
        out.scatter_add_(0, run, one.expand(run.shape))
    return counts[:, 1:-1]


def kept_bits(keys: Tensor, prune_count: int) -> tuple[Tensor, int]:
    """Return the bits of all but the ``prune_count`` smallest keys, (ceil(n / 8),) uint8, and how many are not finite.

    ``keys``: int32 of any shape on the CPU, in storage order. The first of equal keys are pruned.
    """
    keys = keys.flatten()
    native = native_for(keys)
    if native is not None:
        bits = torch.empty(-(-keys.numel() // 8), dtype=torch.uint8)
        return bits, native.pst_select(keys, keys.numel(), prune_count, bits)
    keep = torch.ones(keys.numel(), dtype=torch.uint8)
    keep[keys.sort(stable=True).indices[:prune_count]] = 0
    bad = (keys < LOWEST_FINITE) | (keys > HIGHEST_FINITE)
    return pack_shard(keep, -(-keys.numel() // 8)), int(bad.sum())
