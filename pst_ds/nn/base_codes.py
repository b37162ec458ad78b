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

BASE_CODES, BASE_SCALES = "pst_base_codes", "pst_base_scales"
"""Names of the two parameters of a layer with quantised W0, both of dtype uint8."""
_TILE = 1 << 22
"""Weights per tile."""


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
        codes, scales = sharding.shard_of(self.codes).values, sharding.shard_of(self.scales).values
        shard = sharding.shard_index(self.codes) if sharding.is_partitioned(self.codes) else None
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
    weight, num_shards = target.weight, num_shards or 1
    layout = CodeLayout(StoredGrid(target.own_layout, grid), num_shards)
    mask_bytes = shard_bytes(target.own_layout.numel, num_shards)
    sizes = layout.num_code_bytes, layout.num_scale_bytes, num_shards * mask_bytes
    if weight.is_meta:
        parts = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
    else:
        read_now([weight])
        own = [sharding.shard_index(weight)] if sharding.is_partitioned(weight) else range(num_shards)
        with sharding.gathered([weight]):
            require_finite(f"{target.name}.weight", weight)
            coded = [layout.encode(weight, shard) for shard in own]
            parts = [torch.cat(part) for part in zip(*coded, strict=True)]
            bits = all_ones(target.own_layout.numel, num_shards).view(num_shards, -1).to(parts[0].device)
            for shard in own if from_zeros else ():
                start, stop = layout.weights_of(shard)
                bits[shard] = pack_shard(weight.detach().reshape(-1)[start:stop] != 0, mask_bytes)
        parts.append(torch.cat([bits[shard] for shard in own]))
    codes, scales, mask = (sharding.bytes_split_as(weight, size, part) for size, part in zip(sizes, parts, strict=True))
    sharding.drop(weight)
    return BaseCodes(layout, codes, scales, mask, weight.dtype)


def require_finite(name: str, weight: Tensor) -> None:
    """Raise InjectionError, naming the weight, for NaN or infinite values."""
    if not torch.stack(torch.aminmax(weight)).isfinite().all():  # without a copy of the weight
        raise InjectionError(f"{name} has NaN or infinite values; the base model is damaged")


def mean_magnitudes(targets: Sequence[Target], bases: Mapping[str, BaseCodes]) -> dict[str, tuple[float, ...]]:
    """Return mean |W0| of every matrix, by layer name: exact integer sums, so bit-identical for any sharding.

    ``bases``: quantised W0, by layer name. Collective under ZeRO-3. Raises InjectionError for a matrix whose values are
    all 0, or not finite.
    """
    owners = [(t, matrix) for t in targets for matrix in _matrices_of_all_ranks(t)]
    any_base = bases.get(targets[0].name)
    any_param = any_base.codes if any_base else targets[0].weight
    zero = torch.zeros((), device=sharding.shard_of(any_param).values.device)

    def own_tiles(target: Target, matrix: StoredMatrix | None) -> Iterator[Tensor]:
        if matrix is None:
            return iter(())
        base = bases.get(target.name)
        own = own_weights(target.weight, target.own_layout) if base is None else base.own(base.dtype)
        return map(own.rect, shard_tiles(matrix.rect, own.row_length, own.start, own.stop, _TILE))

    own_largest = [torch.stack([zero, *(v.abs().max().float() for v in own_tiles(t, m))]).max() for t, m in owners]
    largest = group_max(torch.stack(own_largest).double().nan_to_num(nan=math.inf, posinf=math.inf), any_param).tolist()
    for (target, _), value in zip(owners, largest, strict=True):
        if not math.isfinite(value):
            raise InjectionError(f"{target.weight_name} has NaN or infinite values; the base model is damaged")
    exponents = [fixed_point_exponent(value) for value in largest]
    scaled = zip(owners, exponents, strict=True)
    own = [sum(int(abs_sum_fixed_point(v, e)) for v in own_tiles(t, m)) for (t, m), e in scaled]
    sums = torch.tensor(own, dtype=torch.int64)
    scales: dict[str, tuple[float, ...]] = {}
    for (target, _), total, exponent in zip(owners, group_sum(sums, any_param).tolist(), exponents, strict=True):
        mean = total / 2.0**exponent / target.layout.matrix_numel
        if mean == 0.0:
            raise InjectionError(f"{target.weight_name} is all zeros; leave it out with exclude_modules")
        scales[target.name] = (*scales.get(target.name, ()), mean)
    return scales


def _matrices_of_all_ranks(target: Target) -> Iterator[StoredMatrix | None]:
    """Yield the matrices of a target where they are in its weight; None for those in experts of other ranks."""
    own = target.own_layout.matrices()
    for position in range(1 if target.group is None else target.group.degree):
        is_here = target.group is None or position == target.group.position
        yield from own if is_here else [None] * len(own)
