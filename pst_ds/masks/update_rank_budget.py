"""Drop the least important components of the low-rank updates, until a budget over all matrices is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pst_ds.core.updates.gates import DROPPED, importance, is_dropped, kept_gates, rank_budget
from pst_ds.masks.layer_scores import whole_masters
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import UPDATE_FACTORS, PSTLayer
from pst_ds.parallel import zero3


@dataclass(frozen=True, slots=True)
class RankStats:
    """Statistics of the components of all updates; the same on every rank and for every world size."""

    components: int
    """Components at the start."""
    matrices: int
    kept: tuple[int, ...] = field(default=(), repr=False)
    """Components that each layer keeps, over all its matrices, in model order."""

    @property
    def mean_rank(self) -> float:
        """Mean number of components per matrix."""
        return sum(self.kept) / self.matrices


@torch.no_grad()
def update_ranks(model: nn.Module, dropped_share: float) -> RankStats:
    """Close the gates of the least important components for good, until ``dropped_share`` of all are dropped.

    The choice depends only on the masters of U, V and the gates; ties are broken by the order of layers and components.
    Collective: under ZeRO-3 one all-gather for all layers. Raises FloatingPointError on every rank, naming the layers,
    for factors that are not finite.
    """
    layers = pst_layers(model)
    return drop_components(layers, whole_masters(list(layers.values()), UPDATE_FACTORS), dropped_share)


def drop_components(
    layers: dict[str, PSTLayer], masters: Sequence[dict[str, Tensor]], dropped_share: float
) -> RankStats:
    """Do the same as :func:`update_ranks`, given the full ``masters`` of U, V and G of each layer, in which dropped
    gates are overwritten too. Not collective."""
    sizes, found = [], []
    for layer, own in zip(layers.values(), masters, strict=True):
        found.append(importance(own["U"], own["V"], own["G"], layer.layout, layer.magnitude_scales).cpu())
        sizes.append(own["V"].shape[0] // own["G"].numel())
    bad = [name for name, one in zip(layers, found, strict=True) if not bool(one.isfinite().all())]
    if bad:
        raise FloatingPointError(f"the updates of {', '.join(bad[:4])} are not finite; lower the learning rate of them")
    components = sum(one.numel() * size for one, size in zip(found, sizes, strict=True))
    kept = kept_gates(found, sizes, rank_budget(components, dropped_share))
    for layer, own, keep in zip(layers.values(), masters, kept, strict=True):
        assert layer.pst_G is not None
        own["G"].masked_fill_(~keep.to(own["G"].device), DROPPED)
        zero3.fill_where(layer.pst_G, ~keep, DROPPED)
    counts = tuple(int(keep.sum()) * size for keep, size in zip(kept, sizes, strict=True))
    return RankStats(components, sum(layer.layout.num_matrices for layer in layers.values()), counts)


@torch.no_grad()
def ranks_kept(model: nn.Module) -> list[int]:
    """Return the number of components that each layer keeps, in model order; all for one without gates. Collective."""
    layers = list(pst_layers(model).values())
    gated = [layer.pst_G for layer in layers if layer.pst_G is not None]
    with zero3.gathered([gates for gates in gated if zero3.is_released(gates)]):
        open_gates = iter([int((~is_dropped(gates.detach())).sum()) for gates in gated])
    found: list[int] = []
    for layer in layers:
        rank = 0 if layer.pst_V is None else zero3.full_shape(layer.pst_V)[0]
        size = 1 if layer.pst_G is None else rank // zero3.full_numel(layer.pst_G)
        found.append(rank if layer.pst_G is None else next(open_gates) * size)
    return found
