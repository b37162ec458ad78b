"""The updated weights of a rank's shard, for update forms without kernels.

Kernels of the scores compute W0 + beta U V themselves. The weights of any other form are computed here, once per mask
update, and are ranked as if they were W0.
"""

import torch

from pst_ds.core.coded_weight import OwnWeights
from pst_ds.core.factors import Factors, tile_factors
from pst_ds.core.layout import shard_tiles, view_in_shard
from pst_ds.core.scores import sliced_weight
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import sharding

_TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Weights that are updated in one step, by device; forms make several copies of them."""


def updated_base(layer: PSTLayer, base: OwnWeights, factors: Factors) -> OwnWeights:
    """Return the updated weights of ``base``, this rank's shard of W0; ``base`` itself if kernels compute the update.

    The result is fp32. ``factors``: those of the whole layer. Collective for forms that are not exact in slices, which
    gather the layer's weight.
    """
    if not factors.update:
        return base
    updated = torch.empty(base.stop - base.start, device=base.device)
    if layer.constants.form.exact_in_slices:
        _update_shard(updated, layer, base, factors)
    else:
        _update_from_whole(updated, layer, base, factors)
    return OwnWeights(updated, base.start, base.row_length)


def _update_shard(updated: torch.Tensor, layer: PSTLayer, base: OwnWeights, factors: Factors) -> None:
    """Fill ``updated`` tile by tile from the weights of the shard."""
    size = _TILE_ELEMENTS.get(base.device.type, _TILE_ELEMENTS["cuda"])
    for matrix in layer.layout.matrices():
        for rect in shard_tiles(matrix.rect, base.row_length, base.start, base.stop, size):
            tile = tile_factors(factors, layer.layout, matrix, rect)
            values = sliced_weight(base.rect(rect), tile, layer.constants)
            view_in_shard(updated, rect, base.row_length, base.start).copy_(values)


def _update_from_whole(updated: torch.Tensor, layer: PSTLayer, base: OwnWeights, factors: Factors) -> None:
    """Fill ``updated`` from whole matrices. Every rank computes all of them and keeps its part."""
    weight = _whole_weight(layer).to(base.device)
    for matrix in layer.layout.matrices():
        tile = tile_factors(factors, layer.layout, matrix, matrix.rect)
        values = sliced_weight(weight[matrix.rect.slices], tile, layer.constants)
        # tiles of any size: the values are there already
        for rect in shard_tiles(matrix.rect, base.row_length, base.start, base.stop, weight.numel()):
            view_in_shard(updated, rect, base.row_length, base.start).copy_(values[rect.inside(matrix.rect)])


def _whole_weight(layer: PSTLayer) -> torch.Tensor:
    """Return W0 in storage shape, dequantised. Collective."""
    if layer.weight is not None:
        return sharding.whole(layer.weight).view(layer.layout.shape)
    codes = layer.base_codes
    assert codes is not None
    # codes and scales are divided among ranks like a weight, and dequantised only when they are whole
    with sharding.gathered([codes.codes, codes.scales]):
        return layer.dense_weight()
