"""Select the masks anew: every rank scores its own shard of each weight, and no weight is gathered."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pst_ds.core.bits import checksum, pack_shard, unpack_shard
from pst_ds.core.factors import Factors, tile_factors
from pst_ds.core.layout import Block, shard_tiles, view_in_shard
from pst_ds.core.scores import importance
from pst_ds.core.select import Cut, MatrixKeys, NonFiniteScoreError, order_keys, prune_count, select
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.linear import PSTLinear
from pst_ds.parallel import zero3
from pst_ds.parallel.ranks import group_sum, rank_sums

SCORE_TILE_ELEMENTS = 1 << 16
"""Weights scored at a time: the tile and its scratch stay in a core's cache."""
KEY_CACHE_BYTES = 256 << 20
"""Keys are kept between the radix passes while all of a rank's fit in here; beyond it they are computed again."""


@dataclass(frozen=True, slots=True)
class MaskStats:
    """The masks of all layers together; the same on every rank and for every world size."""

    num_weights: int
    num_pruned: int
    num_flipped: int
    """Bits that differ from those before the update."""
    checksum: str
    """16 hexadecimal digits; a function of the masks and the layer names alone."""

    @property
    def sparsity(self) -> float:
        return self.num_pruned / self.num_weights

    @property
    def flip_rate(self) -> float:
        return self.num_flipped / self.num_weights


class _LayerShard:
    """One layer's weights and scores on this rank."""

    def __init__(self, name: str, layer: PSTLinear, factors: Factors, cache_keys: bool):
        self.name, self.layer, self.factors = name, layer, factors
        shard = zero3.shard_of(layer.weight)
        self.weight, self.start = shard.values, shard.start
        self.stop = self.start + self.weight.numel()
        self.blocks = layer.layout.blocks()
        self._cache = torch.empty_like(self.weight, dtype=torch.int32) if cache_keys else None
        self._cached: set[int] = set()

    def key_tiles(self, block: Block) -> Iterator[Tensor]:
        """int32 keys of this rank's part of ``block``, in rising flat order."""
        row_length = self.layer.layout.shape[1]
        for rect in shard_tiles(block.rect, row_length, self.start, self.stop, SCORE_TILE_ELEMENTS):
            if block.part in self._cached and self._cache is not None:
                yield view_in_shard(self._cache, rect, row_length, self.start)
                continue
            tile = tile_factors(self.factors, self.layer.layout, block, rect)
            values = view_in_shard(self.weight, rect, row_length, self.start)
            scale = self.layer.weight_scales[block.part]
            keys = order_keys(importance(values, tile, self.layer.constants, scale))
            if self._cache is not None:
                view_in_shard(self._cache, rect, row_length, self.start).copy_(keys)
            yield keys
        self._cached.add(block.part)

    def write_mask(self, cuts: list[Cut]) -> None:
        """Set this rank's mask bits by the cut of each block."""
        row_length = self.layer.layout.shape[1]
        keep = torch.empty_like(self.weight, dtype=torch.bool)
        for block, cut in zip(self.blocks, cuts, strict=True):
            rects = shard_tiles(block.rect, row_length, self.start, self.stop, SCORE_TILE_ELEMENTS)
            for rect, keys in zip(rects, self.key_tiles(block), strict=True):
                kept, cut = cut.keep(keys)
                view_in_shard(keep, rect, row_length, self.start).copy_(kept)
        write_mask_shard(self.layer, keep)


def mask_shard(layer: PSTLinear) -> Tensor:
    """This rank's mask, uint8 0/1, one for each weight of its shard."""
    count = zero3.shard_of(layer.weight).values.numel()
    return unpack_shard(zero3.shard_of(layer.pst_mask).values, count)


def write_mask_shard(layer: PSTLinear, keep: Tensor) -> None:
    """Write this rank's mask bits, (n,) bool for the n weights of its shard. Every rank must."""
    zero3.write_shard(layer.pst_mask, pack_shard(keep, zero3.shard_of(layer.pst_mask).values.numel()))


@torch.no_grad()
def update_masks(model: nn.Module, sparsity: float) -> MaskStats:
    """Prune exactly floor(sparsity * numel) of every matrix: those of the smallest scores, from the fp32 masters.

    Among equal scores the lowest flat index goes first. Collective, with a number of collectives that does not depend
    on the number of layers. Raises NonFiniteScoreError on every rank, naming the layers; the masks are then unchanged.
    """
    layers = pst_layers(model)
    for name, layer in layers.items():
        assert zero3.num_shards(layer.weight) == layer.num_shards, f"{name}: num_shards is not how it is partitioned"
    before = [mask_shard(layer) for layer in layers.values()]
    shards = _layer_shards(layers)
    any_weight = next(iter(layers.values())).weight
    matrices = [
        MatrixKeys(prune_count(sparsity, block.rect.numel), partial(shard.key_tiles, block))
        for shard in shards
        for block in shard.blocks
    ]
    try:
        cuts = iter(select(matrices, rank_sums(any_weight), shards[0].weight.device))
    except NonFiniteScoreError as error:
        names = [shard.name for shard in shards for _ in shard.blocks]
        raise FloatingPointError(
            f"importance scores of {', '.join(dict.fromkeys(names[i] for i in error.matrices))} are not finite; lower "
            "the learning rate of the scores or updates, or resume from the last checkpoint"
        ) from None
    for shard in shards:
        shard.write_mask([next(cuts) for _ in shard.blocks])
    return mask_stats(model, before)


def mask_stats(model: nn.Module, before: list[Tensor] | None = None) -> MaskStats:
    """Counts and checksum of the masks as they are; flips against ``before``, a mask shard a layer. Collective."""
    layers = pst_layers(model)
    kept = flipped = total_sum = 0
    for i, (name, layer) in enumerate(layers.items()):
        now = mask_shard(layer)
        kept += int(now.sum(dtype=torch.int64))
        if before is not None:
            flipped += int((now != before[i]).sum())
        start = zero3.shard_of(layer.weight).start
        total_sum += int(checksum(now, start, zlib.crc32(name.encode())))
    total_sum = (total_sum + (1 << 63)) % (1 << 64) - (1 << 63)
    any_weight = next(iter(layers.values())).weight
    kept, flipped, total_sum = group_sum(torch.tensor([kept, flipped, total_sum]), any_weight).tolist()
    num_weights = sum(layer.layout.numel for layer in layers.values())
    return MaskStats(num_weights, num_weights - kept, flipped, f"{total_sum % (1 << 64):016x}")


def _layer_shards(layers: dict[str, PSTLinear]) -> list[_LayerShard]:
    """Every layer with the whole fp32 masters of its factors; one all-gather for all of them under ZeRO-3."""
    owned = [(layer, name, param) for layer in layers.values() for name, param in layer.factor_parameters()]
    masters = zero3.fp32_masters([param for _, _, param in owned])
    by_layer: dict[PSTLinear, dict[str, Tensor]] = {layer: {} for layer in layers.values()}
    for (layer, name, _), master in zip(owned, masters, strict=True):
        by_layer[layer][name] = master
    num_here = sum(zero3.shard_of(layer.weight).values.numel() for layer in layers.values())
    cache_keys = num_here * 4 <= KEY_CACHE_BYTES
    return [_LayerShard(name, layer, Factors(**by_layer[layer]), cache_keys) for name, layer in layers.items()]
