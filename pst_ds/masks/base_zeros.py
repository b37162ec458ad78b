"""Masks that keep exactly the non-zeros of a base model."""

import torch
from torch import Tensor, nn

from pst_ds.core.bits import pack_shard
from pst_ds.masks.mask_source import MaskSource
from pst_ds.masks.update import MaskStats, mask_stats
from pst_ds.nn.inject import settled_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import sharding


class BaseZeros(MaskSource):
    """Keeps the non-zeros of a base model with ``initial_mask = "zeros"`` at any scheduled sparsity."""

    def __init__(self, model: nn.Module):
        self._model = model

    def update(self, target: float, progress: float) -> MaskStats:
        return masks_of_zeros(self._model)


@torch.no_grad()
def masks_of_zeros(model: nn.Module) -> MaskStats:
    """Keep exactly the current non-zeros of the weights. Collective; each rank reads its shard.

    A quantised base was masked before it was quantised, see :func:`pst_ds.nn.base_codes.encode_base`.
    """
    written: dict[PSTLayer, Tensor] = {}
    for layer in settled_layers(model).values():
        # a layer without one has quantised codes, whose masks were made before they were
        if layer.weight is not None:
            is_kept = sharding.shard_of(layer.weight).values != 0
            written[layer] = pack_shard(is_kept.byte(), layer.own_bits().numel())
    return mask_stats(model, written)
