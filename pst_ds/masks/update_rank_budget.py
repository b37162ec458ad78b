"""Drop the least important components of the low-rank updates, until a budget over all matrices is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pst_ds.core.updates.gates import DROPPED, importance, kept_gates, rank_budget
from pst_ds.masks.layer_scores import whole_masters
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import UPDATE_FACTORS, PSTLayer
from pst_ds.parallel import zero3


@dataclass(frozen=True, slots=True)
class ComponentStats:
    """Statistics of the components of all updates; the same on every rank and for every world size."""

    components: int
    """Components at the start."""
    matrices: int
    kept: tuple[int, ...] = field(default=(), repr=False)
    """Components that each layer keeps, over all its matrices, in model order."""

    @property
    def mean_update_rank(self) -> float:
        """Mean number of components per matrix."""
        return sum(self.kept) / self.matrices


@torch.no_grad()
def drop_components(model: nn.Module, dropped_share: float) -> ComponentStats:
    """Close the gates of the least important components for good, until ``dropped_share`` of all are dropped.

    The choice depends only on the masters of U, V and the gates; ties are broken by the order of layers and components.
    Collective: under ZeRO-3 one all-gather for all layers. Raises FloatingPointError on every rank, naming the layers,
    for factors that are not finite.
    """
    layers = pst_layers(model)
    return drop_in_masters(layers, whole_masters(list(layers.values()), UPDATE_FACTORS), dropped_share)


def drop_in_masters(
    layers: dict[str, PSTLayer], masters: Sequence[dict[str, Tensor]], dropped_share: float
) -> ComponentStats:
    """Do the same, given the full ``masters`` of U, V and G of each layer, and drop in these too. Not collective."""
    sizes, found = [], []
    for layer, own in zip(layers.values(), masters, strict=True):
        found.append(importance(own["U"], own["V"], own["G"], layer.layout, layer.magnitude_scales).cpu())
        sizes.append(own["V"].shape[0] // own["G"].numel())
    bad = [name for name, one in zip(layers, found, strict=True) if not bool(one.isfinite().all())]
    if bad:
        raise FloatingPointError(f"the updates of {', '.join(bad[:4])} are not finite. Lower their learning rate")
    components = sum(one.numel() * size for one, size in zip(found, sizes, strict=True))
    kept = kept_gates(found, sizes, rank_budget(components, dropped_share))
    for layer, own, keep in zip(layers.values(), masters, kept, strict=True):
        assert layer.pst_G is not None
        own["G"].masked_fill_(~keep.to(own["G"].device), DROPPED)
        zero3.fill_where(layer.pst_G, ~keep, DROPPED)
    counts = tuple(int(keep.sum()) * size for keep, size in zip(kept, sizes, strict=True))
    return ComponentStats(components, sum(layer.layout.num_matrices for layer in layers.values()), counts)
