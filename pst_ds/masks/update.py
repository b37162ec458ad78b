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
from pst_ds.core.kernels.triton.bit_sums import BitsOfShard, MatrixBits, ShardBits, placed_bits, replace_bits
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
        """Share of all weights that is pruned."""
        return self.num_pruned / self.num_weights

    @property
    def flip_rate(self) -> float:
        """Share of all mask bits that changed."""
        return self.num_flipped / self.num_weights

    def totals(self) -> dict[str, int | str]:
        """Return the totals over all layers, as JSON values for a checkpoint."""
        return {
            "num_weights": self.num_weights,
            "num_pruned": self.num_pruned,
            "num_flipped": self.num_flipped,
            "checksum": self.checksum,
        }


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
    # Every rank selects in the same matrices and in the same order, also in those of experts that others own.
    matrices: list[Matrix] = []
    for layer in keyed:
        target = sparsity
        if layer.rule.final_sparsity is not None:
            target = layer.rule.final_sparsity * progress
        for part in layer.of_all_ranks():
            for stored in part.matrices:
                matrices.append(Matrix(part, stored, target))
    kept = select_kept(matrices, next(iter(layers.values())).pst_mask)
    here: list[tuple[Matrix, Kept]] = []
    for matrix, bits in zip(matrices, kept, strict=True):
        # other ranks write the masks of their experts
        if not matrix.layer.is_elsewhere:
            here.append((matrix, bits))
    written = _shard_bits(keyed, iter(here))
    return mask_stats(model, written)


def mask_stats(model: nn.Module, written: Mapping[PSTLayer, Tensor] | None = None) -> MaskStats:
    """Return counts and checksum of the masks, after writing ``written``, this rank's new mask bits by layer.

    Collective: one sum over ranks for all layers.
    """
    if written is None:
        written = {}
        layers = settled_layers(model)
    else:
        # the caller has settled them
        layers = pst_layers(model)
    any_mask = next(iter(layers.values())).pst_mask
    shards: list[ShardBits] = []
    for name, layer in layers.items():
        before = layer.own_bits()
        after = written.get(layer, before)
        start, stop = layer.own_range()
        # the name in the checksum tells two layers with equal masks apart
        shards.append(ShardBits(before, after, stop - start, start, zlib.crc32(name.encode())))
    sums = replace_bits(shards)
    for layer, bits in written.items():
        layer.own_bits_changed(bits)
    # One wait for the device, before any rank gathers a mask.
    sharding.finish_writes(any_mask)
    flips, kept, checksums = group_sum(sums, any_mask).t().tolist()
    num_weights = sum(layer.whole_layout.numel for layer in layers.values())
    # of 64 bits: Python's integers do not wrap around as those of the kernels do
    digits = f"{sum(checksums) % (1 << 64):016x}"
    return MaskStats(num_weights, num_weights - sum(kept), sum(flips), digits, tuple(kept), tuple(flips))


def _shard_bits(keyed: Sequence[LayerScores], kept: Iterator[tuple[Matrix, Kept]]) -> dict[PSTLayer, Tensor]:
    """Return this rank's mask bits of each layer, from the ``kept`` bits of the matrices of one layer after another."""
    bits_of_layer: dict[PSTLayer, Tensor] = {}
    by_kernels: dict[PSTLayer, BitsOfShard] = {}
    for layer in keyed:
        of_layer = list(islice(kept, len(layer.matrices)))
        num_bytes = layer.layer.own_bits().numel()
        runs: list[MatrixBits] = []
        in_torch: list[tuple[Matrix, Tensor]] = []
        for matrix, bits in of_layer:
            if serves(layer.device):
                run = as_run(matrix, bits)
                if run:
                    runs.append(run)
            if isinstance(bits, Tensor):
                in_torch.append((matrix, bits))
        if len(runs) == len(of_layer):
            by_kernels[layer.layer] = BitsOfShard(layer.start, layer.stop, num_bytes, runs)
        elif layer.unit == (1, 1) and layer.in_order:
            # bits of one matrix follow those of another, so that they are joined without unpacking them
            pieces = [(bits, layer.num_units(matrix.stored)) for matrix, bits in in_torch]
            bits_of_layer[layer.layer] = join_bits(pieces, num_bytes)
        else:
            keep = torch.empty(layer.stop - layer.start, dtype=torch.uint8, device=layer.device)
            for matrix, bits in in_torch:
                for rect, mask in weights_kept(matrix, bits):
                    layer.write_own(keep, rect, mask)
            bits_of_layer[layer.layer] = pack_shard(keep, num_bytes)
    if by_kernels:
        # one launch for all layers
        placed = placed_bits(list(by_kernels.values()), next(iter(by_kernels)).pst_mask.device)
        bits_of_layer.update(zip(by_kernels, placed, strict=True))
    return bits_of_layer


def _layer_keys(
    layers: dict[str, PSTLayer], criterion: Criterion | None, gradients: Mapping[str, Tensor]
) -> list[LayerScores]:
    """Return the keys of every layer, with weights of other ranks in its units. Collective: one or two all-to-alls."""
    factors = whole_factors(list(layers.values()))
    wide = [layer for layer in layers.values() if layer.rule.pattern.unit(layer.layout) != (1, 1)]
    own_weights: dict[PSTLayer, OwnWeights] = {}
    for layer, of_layer in zip(layers.values(), factors, strict=True):
        base = current_base(layer)
        if not layer.constants.frozen_magnitude:
            base = updated_base(layer, base, of_layer)
        own_weights[layer] = base
    halo_of: dict[PSTLayer, Halo] = {}
    # in two calls, since fewer ranks hold the same experts
    for on_ranks in (False, True):
        exchanged = [layer for layer in wide if (layer.group is not None) == on_ranks]
        # called without layers too: whether there are any is the same on every rank
        halos = fetch_halos(
            [layer.pst_mask for layer in exchanged],
            [layer.split() for layer in exchanged],
            [partial(layer.rule.pattern.aligned, layer.layout) for layer in exchanged],
            [own_weights[layer].values for layer in exchanged],
        )
        halo_of |= zip(exchanged, halos, strict=True)
    keyed: list[LayerScores] = []
    for (name, layer), of_layer in zip(layers.items(), factors, strict=True):
        scores = LayerScores(
            name,
            layer,
            # an update without kernels is in the weights already
            factors=replace(of_layer, update={}),
            own=own_weights[layer],
            halo=halo_of.get(layer),
            criterion=criterion,
            gradient=gradients.get(name),
        )
        keyed.append(scores)
    return keyed
