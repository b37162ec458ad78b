"""Select new masks: every rank scores its shard of each weight, and no weight is gathered."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from pst_ds.core.bits import join_bits, pack_shard
from pst_ds.core.coded_weight import OwnWeights
from pst_ds.core.criteria.criterion import Criterion
from pst_ds.core.kernels.triton.bit_sums import BitsOfShard, ShardBits, placed_bits, replace_bits
from pst_ds.core.kernels.triton.launch import serves
from pst_ds.masks.layer_scores import LayerScores, current_base, whole_factors
from pst_ds.masks.sharded_select import Kept, Matrix, as_run, select_kept, weights_kept
from pst_ds.masks.updated_base import updated_base
from pst_ds.nn.inject import pst_layers, settled_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import sharding
from pst_ds.parallel.halo import Halo, fetch_halos
from pst_ds.parallel.ranks import group_sum


@dataclass(frozen=True, slots=True)
class MaskStats:
    """Statistics of all masks together; the same on every rank and for every world size."""

    num_weights: int
    num_pruned: int
    num_flipped: int
    """Bits that differ from those before the update."""
    checksum: str
    """16 hexadecimal digits; depends on the masks and the layer names only."""
    kept: tuple[int, ...] = field(default=(), repr=False)
    """Weights that each layer keeps, in model order."""
    flipped: tuple[int, ...] = field(default=(), repr=False)
    """Changed bits of each layer."""

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
def update_masks(
    model: nn.Module,
    sparsity: float,
    *,
    progress: float = 1.0,
    criterion: Criterion | None = None,
    gradients: Mapping[str, Tensor] | None = None,
) -> MaskStats:
    """Prune the weights with the smallest scores, computed from the fp32 masters, in the pattern of each layer.

    Layers with their own final sparsity have ``progress`` times that, the others ``sparsity``. Exactly floor(sparsity *
    numel) weights are pruned of a matrix, floor(sparsity * in_features) of every row, floor(share * number) of blocks
    or N:M groups; "global" matrices lose as many in all as they would separately. Among equal scores the lowest flat
    index is pruned first.

    ``criterion``: what scores the weights; None for the learned scores and input norms that the layers have.
    ``gradients``: of whole layers, fp32 in storage shape, by name, if the criterion needs them.

    Collective, with a number of collectives that does not depend on the number of layers. Raises FloatingPointError on
    every rank, naming the layers, for scores that are not finite; the masks are then unchanged.
    """
    layers = settled_layers(model)
    keyed = _layer_keys(layers, criterion, gradients or {})
    own_targets = [k.layer.rule.final_sparsity for k in keyed]
    targets = [sparsity if own is None else own * progress for own in own_targets]
    parts = [(part, target) for k, target in zip(keyed, targets, strict=True) for part in k.of_all_ranks()]
    matrices = [Matrix(part, b, target) for part, target in parts for b in part.matrices]
    kept, here = select_kept(matrices, next(iter(layers.values())).pst_mask), set(map(id, keyed))
    own = ((matrix, bits) for matrix, bits in zip(matrices, kept, strict=True) if id(matrix.layer) in here)
    written = _shard_bits(keyed, own)
    return mask_stats(model, written)


def mask_stats(model: nn.Module, written: Mapping[PSTLayer, Tensor] | None = None) -> MaskStats:
    """Return counts and checksum of the masks, after writing ``written``, this rank's new mask bits by layer.

    Collective: one sum over ranks for all layers.
    """
    layers = settled_layers(model) if written is None else pst_layers(model)
    any_mask = next(iter(layers.values())).pst_mask
    shards = []
    for name, layer in layers.items():
        before, (start, stop) = layer.own_bits(), layer.own_range()
        after = before if written is None else written.get(layer, before)
        shards.append(ShardBits(before, after, stop - start, start, zlib.crc32(name.encode())))
    sums = replace_bits(shards)
    for layer, bits in (written or {}).items():
        layer.own_bits_changed(bits)
    sharding.finish_writes(any_mask)
    flips, kept, checksums = group_sum(sums, any_mask).t().tolist()
    num_weights = sum(layer.whole_layout.numel for layer in layers.values())
    digits = f"{sum(checksums) % (1 << 64):016x}"
    return MaskStats(num_weights, num_weights - sum(kept), sum(flips), digits, tuple(kept), tuple(flips))


def _shard_bits(keyed: Sequence[LayerScores], kept: Iterator[tuple[Matrix, Kept]]) -> dict[PSTLayer, Tensor]:
    """Return this rank's mask bits of each layer, from the ``kept`` bits of the matrices of one layer after another."""
    found, by_kernels = dict[PSTLayer, Tensor](), dict[PSTLayer, BitsOfShard]()
    for layer in keyed:
        own = list(islice(kept, len(layer.matrices)))
        num_bytes = layer.layer.own_bits().numel()
        runs = [run for m, bits in own if (run := as_run(m, bits))] if serves(layer.device) else []
        in_torch = [(m, bits) for m, bits in own if isinstance(bits, Tensor)]
        if len(runs) == len(own):
            by_kernels[layer.layer] = BitsOfShard(layer.start, layer.stop, num_bytes, runs)
        elif layer.unit == (1, 1) and layer.in_order:
            found[layer.layer] = join_bits([(bits, layer.num_units(m.stored)) for m, bits in in_torch], num_bytes)
        else:
            keep = torch.empty(layer.stop - layer.start, dtype=torch.uint8, device=layer.device)
            for matrix, bits in in_torch:
                for rect, mask in weights_kept(matrix, bits):
                    layer.write_own(keep, rect, mask)
            found[layer.layer] = pack_shard(keep, num_bytes)
    if by_kernels:
        placed = placed_bits(list(by_kernels.values()), next(iter(by_kernels)).pst_mask.device)
        found.update(zip(by_kernels, placed, strict=True))
    return found


def _layer_keys(
    layers: dict[str, PSTLayer], criterion: Criterion | None, gradients: Mapping[str, Tensor]
) -> list[LayerScores]:
    """Return the keys of every layer, with weights of other ranks in its units. Collective: one or two all-to-alls."""
    factors = whole_factors(list(layers.values()))
    wide = [layer for layer in layers.values() if layer.rule.pattern.unit(layer.layout) != (1, 1)]
    own_weights: dict[PSTLayer, OwnWeights] = {}
    for layer, of_layer in zip(layers.values(), factors, strict=True):
        base = current_base(layer)
        own_weights[layer] = base if layer.constants.frozen_magnitude else updated_base(layer, base, of_layer)
    halo_of: dict[PSTLayer, Halo] = {}
    for on_ranks in (False, True):  # fewer ranks hold the same experts
        some = [layer for layer in wide if (layer.group is not None) == on_ranks]
        halos = fetch_halos(
            [w.pst_mask for w in some],
            [w.split() for w in some],
            [partial(w.rule.pattern.aligned, w.layout) for w in some],
            [own_weights[w].values for w in some],
        )
        halo_of |= zip(some, halos, strict=True)
    return [
        LayerScores(
            name,
            layer,
            factors=replace(own, update={}),
            own=own_weights[layer],
            halo=halo_of.get(layer),
            criterion=criterion,
            gradient=gradients.get(name),
        )
        for (name, layer), own in zip(layers.items(), factors, strict=True)
    ]
