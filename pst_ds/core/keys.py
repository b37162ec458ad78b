"""Importance scores as integers of the same order, and what selection does with runs of such keys.

A key is an int32 that orders like an fp32 score, with -0 equal to +0. On CPUs the loops are native code
(:mod:`pst_ds.core.kernels`). On other devices, and without a compiler, torch computes bit-identical results.
"""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor

from pst_ds.core.bits import pack_shard
from pst_ds.core.factors import Constants, TileFactors
from pst_ds.core.kernels import library
from pst_ds.core.scores import importance

LOWEST_FINITE, HIGHEST_FINITE = -0x7F800000, 0x7F7FFFFF
"""Keys of the smallest and the largest finite score."""
_MORE_ROOM = 16
"""Spare elements at the end of a buffer: the native loop writes whole vectors."""
MOST_AT_ONCE = 1 << 22
"""Most keys of one matrix held at once on a CPU. Larger matrices are read in tiles (:mod:`pst_ds.core.bracket`)."""
_NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def order_keys(scores: Tensor) -> Tensor:
    """Return int32 keys that order like the fp32 ``scores``, with -0 equal to +0."""
    bits = scores.add(0.0).contiguous().view(torch.int32)  # -0.0 + 0.0 is +0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def scores_of_keys(keys: Tensor) -> Tensor:
    """Return the fp32 scores of the given keys."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def native_for(*tensors: Tensor) -> CDLL | None:
    return library() if all(t.device.type == "cpu" for t in tensors) else None


def score_keys(weight: Tensor, tile: TileFactors, constants: Constants, weight_scale: float = 1.0) -> Tensor:
    """Return order_keys(importance(...)) of one rectangle, (rows, cols) int32, bit-identical for any rectangle.

    ``weight``: W0, (rows, cols). Fastest if the rows of the weight, of V and of B are contiguous.
    """
    is_simple = weight.dtype in _NATIVE_DTYPES and weight.stride(1) == 1
    native = native_for(weight, *tile.held().values()) if is_simple else None
    if native is None:
        return order_keys(importance(weight, tile, constants, weight_scale))
    out = torch.empty(weight.shape, dtype=torch.int32)
    magnitude = constants.magnitude_factor(weight_scale)
    numbers = torch.tensor([constants.beta, magnitude, constants.alpha1], dtype=torch.float32)
    vectors = [v if v is None else (v * constants.alpha2).contiguous() for v in (tile.score_rows, tile.score_cols)]
    norms = [n if n is None else n.float().contiguous() for n in (tile.row_norms, tile.col_norms)]
    update = (tile.update_left, tile.update_right) if constants.update_in_scores else (None, None)
    products = [*_product(*update), *_product(tile.score_left, tile.score_right)]
    stored = _NATIVE_DTYPES[weight.dtype], weight.stride(0), *weight.shape
    native.pst_score_keys(weight, *stored, *products, *vectors, *norms, numbers, out)
    return out


def _product(left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None, int, Tensor]:
    """Return the arguments of a low-rank product for the native loop: left, right, rank, strides."""
    if left is None or right is None:
        return None, None, 0, torch.zeros(3, dtype=torch.int64)
    right = right if right.stride(1) == 1 else right.contiguous()
    return left, right, right.shape[0], torch.tensor([*left.stride(), right.stride(0)])


def single_keys(
    weight: Tensor, rows: Tensor, cols: Tensor, tile: TileFactors, constants: Constants, weight_scale: float = 1.0
) -> Tensor:
    """Return the keys of ``weight``, (n,) W0 at (rows[i], cols[i]) of a rectangle with factors ``tile``: (n,) int32."""
    single: dict[str, Tensor] = {}
    for name, values in tile.held().items():
        if name in ("score_right", "score_cols", "update_right"):
            single[name] = values[..., cols].unsqueeze(-1)
        elif name == "col_norms":
            single["row_norms"] = values[cols]
        else:
            single[name] = values[rows]
    column = TileFactors(**single)  # n rectangles of one weight each
    return order_keys(importance(weight.unsqueeze(1), column, constants, weight_scale)).squeeze(1)


class Classifier:
    """Classifies the keys of one matrix as above, below or inside an interval, and stores the few that are inside.

    :meth:`take` receives all ``num_keys`` keys, fewer than 2**31, in increasing order of their weights. At most
    ``room`` keys inside are stored. For CPUs with native code.
    """

    def __init__(self, num_keys: int, low: int, high: int, *, room: int):
        self._interval, self._room, self._taken = (low, high), room, 0
        self._above = torch.empty(num_keys, dtype=torch.uint8)
        self._numbers = torch.zeros(3, dtype=torch.int64)  # below, inside, not finite
        self._keys, self._index = torch.empty(2, room + _MORE_ROOM, dtype=torch.int32)

    def take(self, keys: Tensor) -> None:
        """Classify the next ``keys``, (n,) int32."""
        native, keys = library(), keys.contiguous()
        assert native is not None
        above, stored = self._above[self._taken :], min(int(self._numbers[1]), self._room)
        native.pst_classify(
            keys, keys.numel(), *self._interval, self._taken, above, self._keys[stored:], self._index[stored:],
            self._room - stored, self._numbers,
        )  # fmt: skip
        self._taken += keys.numel()

    def counts(self) -> Tensor:
        """Return (4,) int64: keys below; keys that are not finite; 1 if ``room`` was exceeded; keys inside."""
        below, inside, not_finite = self._numbers
        return torch.stack([below, not_finite, inside > self._room, inside])

    def above(self) -> Tensor:
        """Return which keys are above the interval, (num_keys,) uint8 0/1."""
        assert self._taken == self._above.numel(), f"{self._taken} keys came, not {self._above.numel()}"
        return self._above

    def inside(self) -> tuple[Tensor, Tensor]:
        """Return the keys inside and their indices among all keys, (n,) int32 each, in increasing order.

        None if ``room`` was exceeded.
        """
        stored = int(self._numbers[1]) if self._numbers[1] <= self._room else 0
        return self._keys[:stored].clone(), self._index[:stored].clone()


def histogram(keys: Tensor, low: int, shift: int, bins: int) -> Tensor:
    """Return the counts of (key - low) >> shift for the keys in [low, low + (bins << shift)): (bins,) int64."""
    native = native_for(keys)
    if native is not None and keys.is_contiguous():
        counts = torch.zeros(bins, dtype=torch.int64)
        native.pst_histogram(keys, keys.numel(), low, shift, bins, counts)
        return counts
    digits = keys.flatten().long().sub_(low).bitwise_right_shift_(shift).clamp_(-1, bins).add_(1)
    counts = torch.zeros(bins + 2, dtype=torch.int64, device=keys.device)
    return counts.scatter_add_(0, digits, counts.new_ones(()).expand(digits.shape))[1:-1]


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
