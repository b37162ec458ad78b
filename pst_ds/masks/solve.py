"""Solve for masks and for the values of kept weights by ALPS, on sums collected while a model trains.

The weights that training has reached, M . (W0 + beta U V), are pruned so that the outputs of their layer change least.
The solution minus beta U V becomes W0 where it is kept; U, V and their optimizer state stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pst_ds.core.bits import pack_shard, unpack_range
from pst_ds.core.factors import Factors, tile_factors
from pst_ds.core.one_shot.alps import alps
from pst_ds.core.one_shot.gram import unit_gram
from pst_ds.core.schedule import Schedules
from pst_ds.core.scores import sliced_weight
from pst_ds.errors import InputError
from pst_ds.masks.layer_scores import whole_factors
from pst_ds.masks.mask_source import MaskSource
from pst_ds.masks.update import MaskStats, mask_stats
from pst_ds.nn.gradient_sums import GradientSums
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import broadcast, raise_on_all_ranks, rank, world_size
from pst_ds.parallel.watchdog import heartbeat

_LEAST_ROW = 0.05
"""Smallest factor of an output's weights when they compete with those of other outputs; the mean square is 1."""


class Solving(MaskSource):
    """Solves for masks and kept weights on inputs and gradients of the last batches before each update.

    Args:
        device: Device of the computation, which offloaded parameters are not on.
        by_token: See :class:`GradientSums`.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, by_token: bool):
        self._model = model
        self._device = device
        self._by_token = by_token
        self._sums: GradientSums | None = None

    @property
    def is_collecting(self) -> bool:
        return self._sums is not None

    def before_batch(self, schedules: Schedules, step: int) -> None:
        if self._sums is None and schedules.listens_at(step):
            self._sums = GradientSums(self._model, self._device, by_token=self._by_token)

    def expect(self, inputs: Mapping[str, Tensor]) -> None:
        if self._sums is not None:
            self._sums.expect(inputs)

    def after_batch(self) -> None:
        if self._sums is not None:
            self._sums.settle()

    def update(self, target: float, progress: float) -> MaskStats:
        # No checkpoint is written while sums are collected, so a resumed run has them too when its update is due.
        assert self._sums is not None
        masks = solve_masks(self._model, self._sums, target, progress)
        self.close()
        return masks

    def close(self) -> None:
        if self._sums is not None:
            self._sums.close()
        self._sums = None


@dataclass(slots=True)
class _Problem:
    """A layer's weights, and what decides which of them to keep."""

    name: str
    layer: PSTLayer
    weight: Tensor
    """W0 + beta U V, fp32 in storage shape; 0 where pruned."""
    change: Tensor
    """beta U V."""
    gram: Tensor
    rows: Tensor
    sparsity: float

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return (W0 in the layer's dtype, mask as uint8 0/1), both in storage shape. Raises InputError."""
        layout = self.layer.layout
        keep = torch.empty(self.weight.shape, dtype=torch.uint8, device=self.weight.device)
        gram = self.gram
        if not bool(gram.any()):  # the layer got no input, or zeros: prune by magnitude
            gram = torch.eye(len(gram), device=gram.device)
        inputs = unit_gram(gram)
        for matrix in layout.matrices():
            at = matrix.rect.slices
            weight = self.weight[at]
            if layout.transposed:
                weight = weight.t()
            rows = self.rows[matrix.outputs]
            # Outputs whose gradient is large count more; the least factor keeps others from losing all their weights.
            factors = (rows / rows.mean().clamp(min=1e-300)).sqrt().clamp_(_LEAST_ROW).float().unsqueeze(1)
            try:
                made = alps(weight * factors, inputs, self.layer.rule.pattern, self.sparsity)
            except FloatingPointError as error:
                raise InputError(f"{self.name}: {error}. Lower the learning rates, or beta") from None
            values = made.weight / factors
            kept = made.keep
            if layout.transposed:
                values = values.t()
                kept = kept.t()
            self.weight[at] = values
            keep[at] = kept
        return ((self.weight - self.change) * keep).to(self.layer.dtype), keep


@torch.no_grad()
def solve_masks(model: nn.Module, sums: GradientSums, sparsity: float, progress: float) -> MaskStats:
    """Prune every layer to its ``sparsity`` by ``sums``, and set the values of the kept weights.

    Layers with their own final sparsity have ``progress`` times that. Ranks solve one layer each at a time. Collective.
    Raises InputError on every rank for a weight that is not finite.
    """
    layers = pst_layers(model)
    statistics = sums.statistics()
    factors = dict(zip(layers, whole_factors(list(layers.values())), strict=True))
    written: dict[PSTLayer, Tensor] = {}
    # As many layers at a time as there are ranks: all gather each of them, and then each rank solves one.
    for first in range(0, len(layers), world_size()):
        names = list(layers)[first : first + world_size()]
        problem = None
        for turn, name in enumerate(names):
            heartbeat(f"the masks of {name}")
            layer = layers[name]
            # Each rank takes all statistics, since they are exchanged in the order of the layers.
            gram, rows = next(statistics)
            target = sparsity
            if layer.rule.final_sparsity is not None:
                target = layer.rule.final_sparsity * progress
            assert layer.weight is not None
            with sharding.gathered([layer.weight, layer.pst_mask]):
                if turn == rank():
                    merged = _merged(layer, factors[name].to(sums.device), sums.device)
                    problem = _Problem(name, layer, *merged, gram, rows, target)
        own = raise_on_all_ranks(partial(_solved, problem))
        for turn, name in enumerate(names):
            layer = layers[name]
            written[layer] = _write(layer, *own, source=turn, device=sums.device)
    return mask_stats(model, written)


def _solved(problem: _Problem | None) -> tuple[Tensor, Tensor]:
    """Return the solution of this rank's problem; empty tensors on a rank without one."""
    if problem is None:
        return torch.empty(0), torch.empty(0)
    return problem.solve()


def _merged(layer: PSTLayer, factors: Factors, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return M . (W0 + beta U V) and beta U V, fp32 in storage shape. The parameters must be gathered."""
    layout = layer.layout
    weight = layer.dense_weight().to(device)
    bits = layer.pst_mask.detach().to(device)
    merged = torch.empty(layout.shape, device=device)
    for matrix in layout.matrices():
        at = matrix.rect.slices
        tile = tile_factors(factors, layout, matrix, matrix.rect)
        merged[at] = sliced_weight(weight[at], tile, layer.constants)
    keep = unpack_range(bits, layout.numel, layer.num_shards, 0, layout.numel)
    return merged * keep.view(layout.shape), merged - weight


def _write(layer: PSTLayer, weight: Tensor, keep: Tensor, *, source: int, device: torch.device) -> Tensor:
    """Write this rank's shard of the new W0, which rank ``source`` has; return its bits of the mask. Collective."""
    param = layer.weight
    assert param is not None
    if source != rank():
        weight = torch.empty(layer.layout.shape, dtype=layer.dtype, device=device)
        keep = torch.empty(layer.layout.shape, dtype=torch.uint8, device=device)
    weight, keep = broadcast(weight, source), broadcast(keep, source)
    sharding.write_whole(param, weight)
    own = layer.own_bits()
    return pack_shard(keep.flatten()[slice(*layer.own_range())], own.numel()).to(own.device)
