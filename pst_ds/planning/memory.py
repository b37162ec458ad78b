"""Memory of a PST run on one rank, from shapes alone: numbers in, bytes out. ZeRO-3 as DeepSpeed 0.19.8 does it: a
parameter of n elements lies on w ranks as ceil(n / w) elements each; a module's parameters are gathered whole for its
turn; trainables have an fp32 master and two Adam moments, a 16-bit gradient shard and a share of one reduction bucket.
What is resident all the time is counted from shapes exactly; what comes and goes is bounded by the largest module.
tools.bench.scale holds the sums against the resident memory of real runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pst_ds.core.bits import shard_numel
from pst_ds.core.bracket import BRACKET_DEVIATIONS, sample_size
from pst_ds.core.keys import MOST_AT_ONCE
from pst_ds.core.layout import WeightLayout
from pst_ds.core.scores import mask_band_elements
from pst_ds.core.tiles import plan_tiles, tile_bytes_of

ADAM_BYTES = 12
"""fp32 master, first and second moment of a trainable."""
GLOO = "gloo"
RUNTIME_BYTES = {"cpu": 48 << 20, "cuda": 600 << 20}
"""Beside all tensors: library pages, threads and scratch of a process that has trained a step, above its imports. CPU:
measured with a model of 0.1 million parameters. CUDA: context and cuBLAS workspaces, assumed."""
SCORED_TILE_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Scratch of the scoring pass of a mask update: keys, scores and their terms of one tile."""


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """``count`` parameter tensors alike."""

    numel: int
    element_size: int
    count: int = 1
    trainable: bool = False
    is_mask: bool = False
    is_scales: bool = False
    """Scales that a layer's weights are rounded with."""
    is_factor: bool = False
    """A factor of a pruned matrix, whose fp32 master travels to every rank for a mask update."""
    stands_for: int | None = None
    """Parameters that these bytes stand for: the weights of codes, 0 for their scales; None for the elements."""


@dataclass(frozen=True, slots=True)
class ModuleNumbers:
    """Parameters that one module holds itself, which ZeRO-3 gathers for its turn, by dtype."""

    numel: int
    gathered_bytes: int
    """Bytes of all its parameters, whole."""
    largest_gather_bytes: int
    """Bytes of its largest collective: parameters of one dtype travel together."""
    work_bytes: int = 0
    """Temporaries of a pruned layer, see :func:`layer_work_bytes`; 0 for another."""
    count: int = 1
    bands: int = 0
    """Bands of rows that a pruned layer's backward pass goes through; 0 for another."""


@dataclass(frozen=True, slots=True)
class MatrixGroup:
    """``count`` pruned matrices of ``numel`` weights."""

    numel: int
    count: int = 1
    share: float = 1.0
    """Share of a micro-batch's tokens that each is multiplied with: k / E of those of experts."""
    per_layer: int = 1
    """Matrices of the layer that each is in, one behind the other: those of a stack of experts."""

    def num_cut(self, shards: int) -> int:
        """Count the matrices that borders of shards cut, which ranks select together; of a linear layer's, all."""
        return self.count if self.per_layer == 1 else self.count // self.per_layer * min(self.per_layer, shards - 1)


@dataclass(frozen=True, slots=True)
class ModelNumbers:
    """Sizes of a model, as the formulas need them."""

    tensors: tuple[TensorGroup, ...]
    modules: tuple[ModuleNumbers, ...]
    matrices: tuple[MatrixGroup, ...]
    score_rank: int = 0
    update_rank: int = 0
    dense_weights: int = 0
    """Weights of linear layers that are not pruned, such as a causal model's head."""
    sliced_weights: int = 0
    """Of these, those of output layers that are codes, and become weights a slice at a time."""
    attention_width: int = 0
    """Width of all attention heads of a layer, summed over layers."""

    @property
    def pruned_weights(self) -> int:
        return sum(m.numel * m.count for m in self.matrices)

    @property
    def multiplied_weights(self) -> float:
        """Pruned weights that a token is multiplied with: of E experts those of k."""
        return sum(m.numel * m.count * m.share for m in self.matrices)

    @property
    def num_matrices(self) -> int:
        return sum(m.count for m in self.matrices)

    @property
    def num_layers(self) -> int:
        """Pruned layers."""
        return sum(m.count for m in self.modules if m.bands)

    @property
    def num_bands(self) -> int:
        """Bands of the backward passes of all pruned layers."""
        return sum(m.bands * m.count for m in self.modules)

    @property
    def num_trainables(self) -> int:
        """Trainable tensors."""
        return sum(t.count for t in self.tensors if t.trainable)

    def num_cut(self, shards: int) -> int:
        """Matrices whose cut ranks find together in a mask update; others lie whole on one."""
        return sum(m.num_cut(shards) for m in self.matrices)

    def sampled_keys(self, shards: int) -> int:
        """Keys of these that a mask update shows to every rank."""
        return sum(sample_size(m.numel) * m.num_cut(shards) for m in self.matrices)

    @property
    def parameters(self) -> int:
        plain = (t for t in self.tensors if not (t.is_mask or t.is_scales))
        return sum((t.numel if t.stands_for is None else t.stands_for) * t.count for t in plain)

    @property
    def coded_weights(self) -> int:
        """Frozen weights that are held as codes."""
        return sum((t.stands_for or 0) * t.count for t in self.tensors)

    @property
    def trainables(self) -> int:
        return sum(t.numel * t.count for t in self.tensors if t.trainable)

    @property
    def factor_parameters(self) -> int:
        return sum(t.numel * t.count for t in self.tensors if t.is_factor)

    @property
    def whole_bytes(self) -> int:
        """Bytes of all parameters and masks, unsharded, which a full sweep of gathers brings."""
        return sum(t.numel * t.count * t.element_size for t in self.tensors)


@dataclass(frozen=True, slots=True)
class ZeroSettings:
    """Settings of DeepSpeed; stage None is one process without it. Sizes in elements, as in its JSON."""

    stage: int | None
    world_size: int = 1
    backend: str = GLOO
    reduce_bucket_size: int = 0
    prefetch_bucket_size: int = 0
    persistence_threshold: int = 0
    max_live_parameters: int = 0
    max_reuse_distance: int = 0
    offload_optimizer: bool = False
    """Optimizer state lies in host memory, not the device's."""
    offload_param: bool = False
    secondary_partition: int = 1
    """Ranks of an hpZ group: each holds a second copy of 1 / secondary_partition of all weights; 1 is off."""

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"world size {self.world_size} must be at least 1")

    @property
    def shards(self) -> int:
        """Ranks that a parameter is split over."""
        return self.world_size if self.stage == 3 else 1


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one rank (the fullest), of its device unless named otherwise."""

    weights: int
    masks: int
    optimizer: int
    gradients: int
    reduce_bucket: int
    gathers: int
    """Parameters whole at the peak of a step: persistent, kept or fetched ahead, and the module's own."""
    communication: int
    """Staging of one gather (gloo copies what it sends and receives); free again when the module's product begins."""
    layer_work: int
    """Temporaries of the layer that needs most."""
    activations: int
    optimizer_step: int
    """fp32 gradients and Adam's temporaries of the largest group, while it steps."""
    mask_update: int
    runtime: int
    teacher: int = 0
    """A teacher that is a model of its own, whole on every rank."""
    scales: int = 0
    """Scales of rounded weights."""
    packed: int = 0
    """On a CPU, the largest 16-bit weight once more, as its product lays it out; in memory that staging has left."""
    host: int = 0
    """Host memory of what is offloaded, not in ``peak``."""

    @property
    def resident(self) -> int:
        """Bytes held all the time."""
        trained = self.weights + self.masks + self.scales + self.optimizer + self.gradients + self.reduce_bucket
        return trained + self.runtime + self.teacher

    @property
    def step_peak(self) -> int:
        turn = self.gathers + max(self.communication, self.packed) + self.layer_work + self.activations
        return self.resident + max(turn, self.optimizer_step)

    @property
    def update_peak(self) -> int:
        return self.resident + self.mask_update

    @property
    def peak(self) -> int:
        return max(self.step_peak, self.update_peak)

    def as_dict(self) -> dict[str, int]:
        names = (*MemoryPlan.__slots__, "resident", "step_peak", "update_peak", "peak")
        return {name: getattr(self, name) for name in names}


def memory_plan(
    model: ModelNumbers,
    zero: ZeroSettings,
    *,
    activations: int,
    element_size: int = 2,
    device: str = "cpu",
    trainable_groups: Sequence[int] | None = None,
    teacher: int = 0,
) -> MemoryPlan:
    """Return what one rank holds of ``model``; ``activations``: bytes of one micro-batch.

    ``element_size``: bytes of a weight, and of a gradient. ``trainable_groups``: trainables of each optimizer group,
    whole; None is one group. ``teacher``: bytes of a teacher that is a model of its own.
    """
    optimizer = optimizer_bytes(model, zero, element_size)
    weights, masks, scales = (
        sum(
            t.count * shard_numel(t.numel, zero.shards) * t.element_size
            for t in model.tensors
            if (t.is_mask, t.is_scales) == kind
        )
        for kind in ((False, False), (True, False), (False, True))
    )
    if zero.secondary_partition > 1:
        weights += model.whole_bytes // zero.secondary_partition
    gathers, communication, work = _turn(model, zero, element_size)
    host = (optimizer if zero.offload_optimizer else 0) + (weights + masks + scales if zero.offload_param else 0)
    return MemoryPlan(
        weights=0 if zero.offload_param else weights,
        masks=0 if zero.offload_param else masks,
        optimizer=0 if zero.offload_optimizer else optimizer,
        gradients=element_size * _trainables_here(model, zero, shared_from_stage=2),
        # allocated whole, but memory is touched only as far as gradients fill it
        reduce_bucket=element_size * min(zero.reduce_bucket_size, model.trainables) if zero.stage else 0,
        gathers=gathers,
        communication=communication,
        layer_work=work,
        activations=activations,
        optimizer_step=_optimizer_step_bytes(model, zero, trainable_groups, element_size, device),
        mask_update=mask_update_bytes(model, zero, device),
        runtime=RUNTIME_BYTES.get(device, 0),
        teacher=teacher,
        scales=0 if zero.offload_param else scales,
        packed=_packed_bytes(model) if device == "cpu" and element_size == 2 else 0,
        host=host,
    )


def _packed_bytes(model: ModelNumbers) -> int:
    """The largest 16-bit weight, which oneDNN reorders before it multiplies; one of 32 bits is read in place."""
    return 2 * max([model.dense_weights - model.sliced_weights, *(matrix.numel for matrix in model.matrices)])


def optimizer_bytes(model: ModelNumbers, zero: ZeroSettings, element_size: int = 2) -> int:
    """Two fp32 moments a trainable, and an fp32 master where the parameter itself is not it.

    Stage 3 splits every parameter over the ranks, stages 1 and 2 the flat whole of them; others keep all.
    """
    bytes_each = 8 if zero.stage is None and element_size == 4 else ADAM_BYTES
    return bytes_each * _trainables_here(model, zero, shared_from_stage=1)


def layer_work_bytes(layout: WeightLayout, itemsize: int, tile_bytes: int = 0, device: str = "cpu") -> int:
    """Temporaries of one layer: M . W and a band of its mask in the forward pass, or one tile in the backward pass.

    ``tile_bytes``: the budget of the backward pass, 0 for the device's default.
    """
    band = min(layout.numel, mask_band_elements(device))
    tiles = plan_tiles(layout, itemsize, tile_bytes, device_type=device)
    return max(
        layout.numel * itemsize + band * (2 + itemsize), tile_bytes_of(tiles.max_numel, tiles.max_band_numel, itemsize)
    )


def mask_update_bytes(model: ModelNumbers, zero: ZeroSettings, device: str = "cpu") -> int:
    """Temporaries of a mask update, at the worst of three moments.

    The factors' masters arrive in one gather, (ranks, shard), and are copied out of it; the sampled keys are held here,
    by all ranks together, and sorted; the scan holds the new masks, the keys inside every bracket with their places, 8
    bytes each, 5 on a CPU, and the largest matrix's keys as bytes. Of stacks of experts those that lie whole on a rank
    have a bracket on a GPU alone.
    """
    if not model.pruned_weights:
        return 0
    masters = 4 * model.factor_parameters
    arrived = 0 if zero.shards == 1 else int(masters * (1 + 1 / zero.shards))
    gathering = max(arrived + masters, 2 * arrived if zero.backend == GLOO else 0)  # gloo stages them, and lets go
    bracketed = [(m, m.num_cut(zero.shards) / zero.shards + _whole_here(m, zero, device)) for m in model.matrices]
    sampled = model.sampled_keys(zero.shards)
    sampled += sum(int(sample_size(m.numel) * _whole_here(m, zero, device)) for m in model.matrices)
    sampling = masters + 4 * 4 * sampled
    inside = sum(here * m.numel * _bracket_share(m.numel) for m, here in bracketed)
    largest = max(m.numel for m in model.matrices) / zero.shards
    place = 1 if device == "cpu" else 4
    scanning = masters + int(model.pruned_weights / zero.shards / 8 + (4 + place) * inside + largest)
    return max(gathering, sampling, scanning) + SCORED_TILE_BYTES.get(device, 0)


def _whole_here(group: MatrixGroup, zero: ZeroSettings, device: str) -> float:
    """Return how many matrices that lie whole on this rank are selected by a bracket; on a CPU they are sorted."""
    if device == "cpu" and group.numel <= MOST_AT_ONCE:
        return 0.0
    return (group.count - group.num_cut(zero.shards)) / zero.shards


def kept_bytes(model: ModelNumbers, zero: ZeroSettings) -> int:
    """Parameters that ZeRO-3 leaves whole from the forward to the backward pass.

    They are the last ones: those used again within the reuse distance, which passes everything behind them twice, or,
    where DeepSpeed fetches ahead, as many as may be live: it runs ahead on every turn of a module until they are.
    """
    elements = max(zero.max_reuse_distance / 2, zero.max_live_parameters if zero.prefetch_bucket_size else 0)
    return int(model.whole_bytes * min(1.0, elements / max(sum(t.numel * t.count for t in model.tensors), 1)))


def persistent_bytes(model: ModelNumbers, zero: ZeroSettings) -> int:
    """Parameters small enough to stay whole all the time."""
    return sum(t.numel * t.count * t.element_size for t in model.tensors if t.numel <= zero.persistence_threshold)


def _bracket_share(numel: int) -> float:
    """Share of a matrix's keys inside the bracket of its cut, at a sparsity of one half, where it is widest."""
    size = sample_size(numel)
    return min(1.0, 2 * BRACKET_DEVIATIONS * math.sqrt(0.25 / size * (1 - size / numel)) + 4 / size)


def _trainables_here(model: ModelNumbers, zero: ZeroSettings, *, shared_from_stage: int) -> int:
    """A rank's share of what there is for every trainable."""
    if zero.stage == 3:
        return sum(t.count * shard_numel(t.numel, zero.shards) for t in model.tensors if t.trainable)
    return math.ceil(model.trainables / (zero.world_size if (zero.stage or 0) >= shared_from_stage else 1))


def _optimizer_step_bytes(
    model: ModelNumbers, zero: ZeroSettings, groups: Sequence[int] | None, element_size: int, device: str
) -> int:
    """fp32 gradients of a group, and two temporaries of AdamW as large. Of one process on a CPU AdamW is fused, without
    temporaries; it takes all gradients at once, and those that are fp32 already as they are."""
    if zero.offload_optimizer:
        return 0
    if zero.stage is None and device == "cpu":
        return 0 if element_size == 4 else 4 * model.trainables
    largest = max(groups) if groups else model.trainables
    return 3 * 4 * math.ceil(largest / (zero.world_size if zero.stage else 1))


def _turn(model: ModelNumbers, zero: ZeroSettings, element_size: int) -> tuple[int, int, int]:
    """(whole parameters, staging, temporaries) in bytes, each of the module that needs most of it: their peaks may lie
    in different modules' turns, but an allocator keeps what one has freed until another needs it."""
    work = max((m.work_bytes for m in model.modules), default=0)
    if zero.stage != 3 or (zero.shards == 1 and not zero.offload_param):  # the share of one rank is used as it is
        return 0, 0, work
    resident = persistent_bytes(model, zero) + kept_bytes(model, zero)
    whole = min(resident + max((m.gathered_bytes for m in model.modules), default=0), model.whole_bytes)
    staging = 0
    if zero.backend == GLOO and zero.world_size > 1:  # gloo flattens what it sends and receives into its buffers
        ahead = min(zero.prefetch_bucket_size, zero.max_live_parameters) * element_size
        largest = max((m.largest_gather_bytes for m in model.modules), default=0)
        staging = int(max(largest, min(ahead, model.whole_bytes)) * (1 + 1 / zero.world_size))
    return whole, staging, work
