"""Select new masks: every rank scores its own shard of each weight, and no weight is gathered."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pst_ds.core.bits import checksum, count_bits, pack_shard
from pst_ds.masks.layer_scores import LayerScores, ranked_weights, whole_factors
from pst_ds.masks.select import Matrix, select_kept, weights_kept
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.linear import PSTLinear
from pst_ds.parallel import zero3
from pst_ds.parallel.halo import fetch_halos
from pst_ds.parallel.ranks import group_sum


@dataclass(frozen=True, slots=True)
class MaskStats:
    """The masks of all layers together; the same on every rank and for every world size."""

    num_weights: int
    num_pruned: int
    num_flipped: int
    """Bits that differ from those before the update."""
    checksum: str
    """16 hexadecimal digits; a function of the masks and the layer names alone."""
    kept: tuple[int, ...] = field(default=(), repr=False)
    """Weights that each layer keeps, in model order."""
    flipped: tuple[int, ...] = field(default=(), repr=False)
    """Bits of each layer that differ."""

    @property
    def sparsity(self) -> float:
        return self.num_pruned / self.num_weights

    @property
    def flip_rate(self) -> float:
        return self.num_flipped / self.num_weights

    def totals(self) -> dict[str, int | str]:
        """Return the totals over all layers, as JSON values for a checkpoint."""
        return {name: getattr(self, name) for name in ("num_weights", "num_pruned", "num_flipped", "checksum")}


@torch.no_grad()
def update_masks(model: nn.Module, sparsity: float, *, progress: float = 1.0) -> MaskStats:
    """Prune by the smallest scores, from the fp32 masters, in the pattern of each layer. A layer with a final sparsity
    of its own has ``progress`` times that, the others ``sparsity``.

    Of a matrix, exactly floor(sparsity * numel) weights are pruned; of "global" ones together, as many as they would be
    each by itself; in every row floor(sparsity * in_features); of blocks, or groups of N:M, floor(share * number).
    Among equal scores the lowest flat index goes first. Collective, with a number of collectives that does not depend
    on the number of layers. Raises FloatingPointError on every rank, naming the layers, for scores that are not finite;
    the masks are then unchanged.
    """
    layers = pst_layers(model)
    for name, layer in layers.items():
        assert zero3.num_shards(layer.pst_mask) == layer.num_shards, f"{name}: num_shards is not how it is partitioned"
    keyed = _layer_keys(layers)
    matrices = [Matrix(k, b, _target(k.layer, sparsity, progress)) for k in keyed for b in k.matrices]
    kept = dict(zip(map(id, matrices), select_kept(matrices, next(iter(layers.values())).pst_mask), strict=True))
    flipped = []
    for keys in keyed:
        own = [m for m in matrices if m.layer is keys]
        flipped.append(_write_mask(keys.layer, _shard_bits(keys, own, [kept.pop(id(m)) for m in own])))
    # The host waits here: DeepSpeed's gathers, on a stream of their own, come after the masks are written.
    return mask_stats(model, flipped_here=flipped)


@torch.no_grad()
def masks_of_zeros(model: nn.Module) -> MaskStats:
    """Keep exactly the non-zeros of the weights, as they are now. Each rank looks at its own shard. Collective.

    Of weights that became codes the mask has those of before, see :func:`pst_ds.nn.base_codes.encode_base`.
    """
    flipped = []
    for layer in pst_layers(model).values():
        if layer.weight is None:
            flipped.append(zero3.shard_of(layer.pst_mask).values.new_zeros((), dtype=torch.int64))
            continue
        num_bytes = zero3.shard_of(layer.pst_mask).values.numel()
        flipped.append(_write_mask(layer, pack_shard((zero3.shard_of(layer.weight).values != 0).byte(), num_bytes)))
    return mask_stats(model, flipped_here=flipped)


def mask_stats(model: nn.Module, *, flipped_here: Sequence[Tensor] = ()) -> MaskStats:
    """Counts and checksum of the masks as they are. ``flipped_here``: this rank's flipped bits of each layer, () int64;
    none by default. Collective: one sum over ranks for all layers, which the host waits for once."""
    layers = pst_layers(model)
    kept_here, sums = [], []
    for name, layer in layers.items():
        bits, (start, stop) = zero3.shard_of(layer.pst_mask).values, layer.own_range()
        kept_here.append(count_bits(bits, bits)[1])
        sums.append(checksum(bits, stop - start, start, zlib.crc32(name.encode())))
    flips = flipped_here or [torch.zeros_like(count) for count in kept_here]
    here = torch.stack([*kept_here, *flips, torch.stack(sums).sum()])  # modulo 2**64, as int64 adds
    *counts, total_sum = group_sum(here, next(iter(layers.values())).pst_mask).tolist()
    num_weights = sum(layer.layout.numel for layer in layers.values())
    kept, flipped = counts[: len(layers)], counts[len(layers) :]
    digits = f"{total_sum % (1 << 64):016x}"
    return MaskStats(num_weights, num_weights - sum(kept), sum(flipped), digits, tuple(kept), tuple(flipped))


def _write_mask(layer: PSTLinear, bits: Tensor) -> Tensor:
    """Make ``bits`` this rank's part of the mask; how many of them differ from those before, ()."""
    differ = count_bits(zero3.shard_of(layer.pst_mask).values, bits)[0]
    zero3.write_shard(layer.pst_mask, bits)
    return differ


def _target(layer: PSTLinear, sparsity: float, progress: float) -> float:
    """The layer's share of zeros now."""
    own = layer.rule.final_sparsity
    return sparsity if own is None else own * progress


def _shard_bits(layer: LayerScores, matrices: list[Matrix], kept: list[Tensor]) -> Tensor:
    """This rank's mask bits of a layer from what its matrices keep."""
    num_bytes = zero3.shard_of(layer.layer.pst_mask).values.numel()
    if len(matrices) == 1 and layer.unit == (1, 1):  # in the order of the shard already
        return torch.cat([kept[0], kept[0].new_zeros(num_bytes - kept[0].numel())])
    keep = torch.empty(layer.stop - layer.start, dtype=torch.uint8, device=layer.device)
    for matrix, bits in zip(matrices, kept, strict=True):
        for rect, mask in weights_kept(matrix, bits):
            layer.write_own(keep, rect, mask)
    return pack_shard(keep, num_bytes)


def _layer_keys(layers: dict[str, PSTLinear]) -> list[LayerScores]:
    """Every layer with the whole fp32 masters of its factors, and the weights its units need of other ranks.
    Collective: one all-gather and one all-to-all for all layers under ZeRO-3."""
    factors = whole_factors(list(layers.values()))
    wide = [layer for layer in layers.values() if layer.rule.pattern.unit(layer.layout) != (1, 1)]
    own_weights = {layer: ranked_weights(layer) for layer in layers.values()}
    halos = fetch_halos(
        [w.pst_mask for w in wide],
        [partial(w.rule.pattern.aligned, w.layout) for w in wide],
        [own_weights[w].values for w in wide],
        [w.layout.numel for w in wide],
    )
    halo_of = dict(zip(wide, halos, strict=True))
    return [
        LayerScores(name, layer, own, own_weights[layer], halo_of.get(layer))
        for (name, layer), own in zip(layers.items(), factors, strict=True)
    ]
