"""The frozen weights W0 as int8 or int4 values with scales, sharded like the weight, and the mean of |W0|."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pst_ds.core.bits import all_ones, pack_shard, shard_bytes
from pst_ds.core.coded_weight import CodedWeight, CodeLayout, OwnWeights, coded_run
from pst_ds.core.layout import StoredMatrix, WeightLayout, shard_tiles
from pst_ds.core.quantization import Grid, StoredGrid
from pst_ds.core.scores import abs_sum_fixed_point, fixed_point_exponent
from pst_ds.nn.sharded_weights import read_now
from pst_ds.nn.targets import InjectionError, Target
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import group_max, group_sum

BASE_CODES = "pst_base_codes"
"""Name of the parameter of a layer with its quantised W0, of dtype uint8."""
BASE_SCALES = "pst_base_scales"
"""Name of the parameter with the scales, whose bytes it has as uint8."""
_TILE = 1 << 22
"""Weights per tile: 16 MiB in fp32."""


@dataclass(frozen=True, slots=True)
class BaseCodes:
    """A quantised W0, which a layer has instead of the parameter ``weight``."""

    layout: CodeLayout
    codes: nn.Parameter
    scales: nn.Parameter
    mask: nn.Parameter
    """Mask bits as in :mod:`pst_ds.core.bits`, partitioned like the codes."""
    dtype: torch.dtype
    """Dtype of the original weight."""

    def whole(self, dtype: torch.dtype) -> CodedWeight:
        """Return W0 in ``dtype``; the parameters must be gathered."""
        return CodedWeight(self.layout, self.codes.detach(), self.scales.detach(), dtype)

    def own(self, dtype: torch.dtype) -> OwnWeights:
        """Return this rank's shard of W0 in ``dtype``; all of it if it is not partitioned."""
        codes = sharding.shard_of(self.codes).values
        scales = sharding.shard_of(self.scales).values
        shard = None
        if sharding.is_partitioned(self.codes):
            shard = sharding.shard_index(self.codes)
        assert shard is not None or self.layout.num_shards == 1, "num_shards is not how the weight is partitioned"
        run = coded_run(self.layout, codes, scales, dtype, shard)
        return OwnWeights(run, run.start, self.layout.stored.layout.shape[1])


def own_weights(param: nn.Parameter, layout: WeightLayout) -> OwnWeights:
    """Return this rank's shard of a parameter with one value per weight of ``layout``, the gathered parameter's."""
    shard = sharding.shard_of(param)
    return OwnWeights(shard.values, shard.start - sharding.first_index(param), layout.shape[1])


@torch.no_grad()
def encode_base(target: Target, grid: Grid, num_shards: int | None, *, from_zeros: bool) -> BaseCodes:
    """Quantise the weight of a target layer and free it; on the meta device only create shapes.

    ``from_zeros``: whether the mask keeps only the weights that are non-zero before quantisation. Collective under
    ZeRO-3, where it gathers the weight on every rank. Raises InjectionError for values that are not finite.
    """
    weight = target.weight
    num_shards = num_shards or 1
    layout = CodeLayout(StoredGrid(target.own_layout, grid), num_shards)
    mask_bytes = shard_bytes(target.own_layout.numel, num_shards)
    sizes = (layout.num_code_bytes, layout.num_scale_bytes, num_shards * mask_bytes)
    if weight.is_meta:
        parts = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
    else:
        read_now([weight])  # it may still be in its file, so that at most one unquantised weight is in memory
        own_shards = range(num_shards)
        if sharding.is_partitioned(weight):
            own_shards = range(sharding.shard_index(weight), sharding.shard_index(weight) + 1)
        # A shard can start inside a group of values with one scale, which needs the group's other values.
        with sharding.gathered([weight]):
            require_finite(f"{target.name}.weight", weight)
            encoded = [layout.encode(weight, shard) for shard in own_shards]
            codes_of_shards, scales_of_shards = zip(*encoded, strict=True)
            parts = [torch.cat(codes_of_shards), torch.cat(scales_of_shards)]
            bits = all_ones(target.own_layout.numel, num_shards).view(num_shards, -1).to(parts[0].device)
            if from_zeros:
                for shard in own_shards:
                    start, stop = layout.weights_of(shard)
                    is_kept = weight.detach().reshape(-1)[start:stop] != 0
                    bits[shard] = pack_shard(is_kept, mask_bytes)
        parts.append(torch.cat([bits[shard] for shard in own_shards]))
    split: list[nn.Parameter] = []
    for size, part in zip(sizes, parts, strict=True):
        split.append(sharding.bytes_split_as(weight, size, part))
    codes, scales, mask = split
    sharding.drop(weight)  # before the next weight is read
    return BaseCodes(layout=layout, codes=codes, scales=scales, mask=mask, dtype=weight.dtype)


def require_finite(name: str, weight: Tensor) -> None:
    """Raise InjectionError, naming the weight, for NaN or infinite values."""
    if not torch.stack(torch.aminmax(weight)).isfinite().all():  # without a copy of the weight
        raise InjectionError(f"{name} has NaN or infinite values; the base model is damaged")


def mean_magnitudes(targets: Sequence[Target], bases: Mapping[str, BaseCodes]) -> dict[str, tuple[float, ...]]:
    """Return mean |W0| of every matrix, by layer name: exact integer sums, so bit-identical for any sharding.

    ``bases``: quantised W0, by layer name. Collective under ZeRO-3, twice for all layers together: the largest |W0| of
    a matrix determines the unit of its integers, which are then summed. Raises InjectionError for a matrix whose values
    are all 0, or not finite.
    """
    # Every rank has an entry for every matrix, since ranks reduce the same number of values.
    owned: list[tuple[Target, StoredMatrix | None]] = []
    for target in targets:
        for matrix in _matrices_of_all_ranks(target):
            owned.append((target, matrix))
    any_base = bases.get(targets[0].name)
    any_param = any_base.codes if any_base else targets[0].weight
    zero = torch.zeros((), device=sharding.shard_of(any_param).values.device)

    def own_tiles(target: Target, matrix: StoredMatrix | None) -> Iterator[Tensor]:
        """Yield this rank's weights of a matrix in tiles, so that copies of them stay small."""
        if matrix is None:
            return
        base = bases.get(target.name)
        own = own_weights(target.weight, target.own_layout) if base is None else base.own(base.dtype)
        for rect in shard_tiles(matrix.rect, own.row_length, own.start, own.stop, _TILE):
            yield own.rect(rect)

    own_largest = []
    for target, matrix in owned:
        of_tiles = [zero]  # a rank may hold no weight of a matrix
        for tile in own_tiles(target, matrix):
            of_tiles.append(tile.abs().max().float())
        own_largest.append(torch.stack(of_tiles).max())
    # A maximum over ranks may lose NaN; infinity stays.
    finite_or_infinite = torch.stack(own_largest).double().nan_to_num(nan=math.inf, posinf=math.inf)
    largest = group_max(finite_or_infinite, any_param).tolist()
    for (target, _), value in zip(owned, largest, strict=True):
        if not math.isfinite(value):
            raise InjectionError(f"{target.weight_name} has NaN or infinite values; the base model is damaged")
    exponents = [fixed_point_exponent(value) for value in largest]
    own_sums = []
    for (target, matrix), exponent in zip(owned, exponents, strict=True):
        own_sum = 0
        for tile in own_tiles(target, matrix):
            own_sum += int(abs_sum_fixed_point(tile, exponent))
        own_sums.append(own_sum)
    sums = group_sum(torch.tensor(own_sums, dtype=torch.int64), any_param).tolist()
    means: dict[str, tuple[float, ...]] = {}
    for (target, _), total, exponent in zip(owned, sums, exponents, strict=True):
        mean = total / 2.0**exponent / target.layout.matrix_numel
        if mean == 0.0:
            raise InjectionError(f"{target.weight_name} is all zeros; leave it out with exclude_modules")
        means[target.name] = (*means.get(target.name, ()), mean)
    return means


def _matrices_of_all_ranks(target: Target) -> Iterator[StoredMatrix | None]:
    """Yield the matrices of a target where they are in its weight; None for those in experts of other ranks."""
    own = target.own_layout.matrices()
    if target.group is None:
        yield from own
        return
    for position in range(target.group.degree):
        if position == target.group.position:
            yield from own
        else:
            yield from [None] * len(own)
