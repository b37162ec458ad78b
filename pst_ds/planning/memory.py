"""Memory of a PST run on one rank, computed from shapes.

ZeRO-3 as DeepSpeed 0.19.8 implements it: a parameter of n elements is partitioned over w ranks, ceil(n / w) elements
each; the parameters of a module are gathered for its turn; trainable parameters have an fp32 master, two Adam moments,
a 16-bit gradient shard and a share of one reduction bucket. Resident memory is counted exactly from shapes; temporary
memory is bounded by the largest module. tools.bench.scale compares the sums with the resident memory of real runs.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pst_ds.core.bits import shard_numel
from pst_ds.core.bracket import BRACKET_DEVIATIONS, sample_size
from pst_ds.core.keys import MOST_AT_ONCE
from pst_ds.core.layout import WeightLayout
from pst_ds.core.scores import mask_band_elements
from pst_ds.core.tiles import plan_tiles, tile_bytes_of
from pst_ds.json_text import JsonObject
from pst_ds.parallel.ds_config import REDUCE_BUCKET, zero_stage
from pst_ds.parallel.links import Group
from pst_ds.planning.model_numbers import MatrixGroup, ModelNumbers, TensorGroup

ADAM_BYTES = 12
"""fp32 master, first and second moment of a trainable value."""
GLOO = "gloo"
RUNTIME_BYTES = {"cpu": 48 << 20, "cuda": 600 << 20}
"""Memory besides tensors after a training step, above the imports: library pages, threads and scratch. CPU: measured
with a model of 0.1 million parameters. CUDA: context and cuBLAS workspaces, assumed."""
SCORED_TILE_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Scratch of the scoring pass of a mask update: keys, scores and their terms of one tile."""


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
    """True if optimizer state is in host memory."""
    offload_param: bool = False
    copy_ranks: int = 0
    """Neighbouring ranks that share a second copy of the frozen weights and masks, see
    :func:`pst_ds.parallel.placement.copy_ranks`."""
    node_size: int = sys.maxsize
    """Ranks of a node."""

    @property
    def shards(self) -> int:
        """Ranks that a parameter is partitioned over."""
        if self.stage == 3:
            return self.world_size
        return 1

    def shard_of(self, tensor: TensorGroup) -> int:
        """Return the elements of a tensor that a rank holds."""
        return shard_numel(tensor.numel, max(1, self.shards // tensor.divided_by))

    def group(self, ranks: int) -> Group:
        """Return the group of so many neighbouring ranks."""
        return Group.of_neighbours(ranks, self.node_size)


def zero_settings(config: JsonObject | None, world_size: int, backend: str) -> ZeroSettings:
    """Read a resolved config (None: one process without DeepSpeed) on ``world_size`` ranks over "gloo" or "nccl"."""
    if config is None:
        return ZeroSettings(stage=None, world_size=world_size, backend=backend)
    section = config.get("zero_optimization")
    if not isinstance(section, dict):
        section = {}

    def number(key: str, default: float) -> int:
        value = section.get(key)
        if isinstance(value, int | float | str):
            return int(value)
        return int(default)

    def is_offloaded(key: str) -> bool:
        target = section.get(key)
        return isinstance(target, dict) and str(target.get("device")).lower() == "cpu"

    copy_ranks = number("zero_hpz_partition_size", 1)
    return ZeroSettings(  # defaults of DeepSpeed 0.19.8
        stage=zero_stage(config),
        world_size=world_size,
        backend=backend,
        reduce_bucket_size=number("reduce_bucket_size", REDUCE_BUCKET),
        prefetch_bucket_size=number("stage3_prefetch_bucket_size", 5e7),
        persistence_threshold=number("stage3_param_persistence_threshold", 1e5),
        max_live_parameters=number("stage3_max_live_parameters", 1e9),
        max_reuse_distance=number("stage3_max_reuse_distance", 1e9),
        offload_optimizer=is_offloaded("offload_optimizer"),
        offload_param=is_offloaded("offload_param"),
        copy_ranks=copy_ranks if copy_ranks > 1 else 0,
    )


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on the fullest rank, in device memory except for ``host``."""

    weights: int
    masks: int
    optimizer: int
    gradients: int
    flat_factors: int
    """Values of the factors and their gradients, which every rank holds whole, see :mod:`pst_ds.nn.flat_factors`."""
    reduce_bucket: int
    gathers: int
    """Gathered parameters at the peak of a step: persistent, kept, prefetched, and the module's own."""
    communication: int
    """Staging of one gather (gloo copies what it sends and receives), freed before the module's product."""
    layer_work: int
    """Temporaries of the layer that needs most."""
    activations: int
    optimizer_step: int
    """fp32 gradients and Adam's temporaries of the largest group during its step."""
    mask_update: int
    runtime: int
    teacher: int = 0
    """A separate teacher model, unsharded."""
    scales: int = 0
    """Scales of quantised weights."""
    copies: int = 0
    """This rank's part of a second copy of frozen weights and masks, see :attr:`ZeroSettings.copy_ranks`."""
    packed: int = 0
    """Copy of the largest 16-bit weight in the layout of its product, on a CPU; it reuses the staging memory."""
    sums: int = 0
    """Sums for ``schedule.solves``, on every rank."""
    host: int = 0
    """Host memory of offloaded tensors."""

    @property
    def resident(self) -> int:
        """Bytes held all the time."""
        frozen = self.weights + self.masks + self.scales + self.copies
        trained = self.optimizer + self.gradients + self.flat_factors + self.reduce_bucket
        return frozen + trained + self.runtime + self.teacher + self.sums

    @property
    def step_peak(self) -> int:
        turn = self.gathers + max(self.communication, self.packed) + self.layer_work + self.activations
        # activations and gathered parameters are freed before the optimizer's step
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
    solves: bool = False,
) -> MemoryPlan:
    """Return what one rank holds of ``model``.

    Args:
        model: sizes of the injected model.
        zero: settings of DeepSpeed.
        activations, element_size: bytes of one micro-batch, and of a weight or gradient.
        device: "cpu" or "cuda".
        trainable_groups: trainable values of each optimizer group over all ranks; None for one group.
        teacher: bytes of a separate teacher model.
        solves: whether the run sums products of inputs for ``schedule.solves``.
    """
    weights = _shard_bytes(model, zero, "weight") + _shard_bytes(model, zero, "factor")
    masks = _shard_bytes(model, zero, "mask")
    scales = _shard_bytes(model, zero, "scales")
    optimizer = optimizer_bytes(model, zero, element_size)
    host = 0
    if zero.offload_param:
        host += weights + masks + scales
        weights = masks = scales = 0
    if zero.offload_optimizer:
        host += optimizer
        optimizer = 0
    copies = 0
    if zero.copy_ranks:
        copies = math.ceil(model.copied_bytes(zero.copy_ranks) / zero.copy_ranks)
    reduce_bucket = 0
    if zero.stage:
        # gradients touch only as much of the bucket's memory as they fill
        reduce_bucket = element_size * min(zero.reduce_bucket_size, model.trainables)
    flat_factors = 0
    if zero.stage is not None:
        flat_factors = 2 * sum(t.nbytes for t in model.tensors if t.kind == "factor" and not t.in_stack)
    packed = 0
    if device == "cpu" and element_size == 2:
        # to multiply, oneDNN reorders 16-bit weights, but reads 32-bit ones in place
        unsliced = model.dense_weights - model.sliced_weights
        packed = 2 * max([unsliced, *(matrix.numel for matrix in model.matrices)])
    turn = _turn(model, zero, element_size)
    return MemoryPlan(
        weights=weights,
        copies=copies,
        masks=masks,
        optimizer=optimizer,
        gradients=element_size * _trainables_here(model, zero, shared_from_stage=2),
        flat_factors=flat_factors,
        reduce_bucket=reduce_bucket,
        gathers=turn.gathers,
        communication=turn.staging,
        layer_work=turn.work,
        activations=activations,
        optimizer_step=_optimizer_step_bytes(
            model, zero, groups=trainable_groups, element_size=element_size, device=device
        ),
        mask_update=mask_update_bytes(model, zero, device),
        runtime=RUNTIME_BYTES.get(device, 0),
        teacher=teacher,
        scales=scales,
        packed=packed,
        sums=8 * model.products if solves else 0,
        host=host,
    )


def _shard_bytes(model: ModelNumbers, zero: ZeroSettings, kind: str) -> int:
    """Return the bytes of a rank's shards of all tensors of one :attr:`TensorGroup.kind`."""
    return sum(t.count * zero.shard_of(t) * t.element_size for t in model.tensors if t.kind == kind)


def optimizer_bytes(model: ModelNumbers, zero: ZeroSettings, element_size: int = 2) -> int:
    """Return the bytes of two fp32 moments per trainable value, and of fp32 masters of 16-bit parameters.

    Stage 3 partitions every parameter over the ranks, stages 1 and 2 the flat concatenation; others keep everything.
    """
    bytes_each = ADAM_BYTES
    if zero.stage is None and element_size == 4:
        bytes_each = 8  # an fp32 parameter is its own master
    return bytes_each * _trainables_here(model, zero, shared_from_stage=1)


def layer_work_bytes(layout: WeightLayout, itemsize: int, tile_bytes: int = 0, device: str = "cpu") -> int:
    """Return the temporaries of one layer: M . W and a band of its mask, or one tile of the backward pass.

    ``tile_bytes``: budget of the backward pass; 0 for the device's default.
    """
    band = min(layout.numel, mask_band_elements(device))
    tiles = plan_tiles(layout, itemsize, tile_bytes, device_type=device)
    backward = tile_bytes_of(tiles.max_numel, tiles.max_band_numel, itemsize)
    return max(layout.numel * itemsize + band * (2 + itemsize), backward)


def mask_update_bytes(model: ModelNumbers, zero: ZeroSettings, device: str = "cpu") -> int:
    """Return the temporaries of a mask update, in the worst of its three phases.

    Gathering: the factors' masters arrive in one buffer, (ranks, shard), and are copied out of it. Sampling: the keys
    that all ranks sampled are sorted. Scanning: the new masks, the keys inside all brackets with their places (8 bytes
    each, 5 on a CPU), and the largest matrix's keys as bytes. Expert matrices that are on one rank have a bracket on
    GPUs only.
    """
    if not model.pruned_weights:
        return 0
    masters = 4 * model.factor_parameters
    arrived = 0
    if zero.shards > 1:
        arrived = int(masters * (1 + 1 / zero.shards))
    gathering = arrived + masters
    if zero.backend == GLOO:
        gathering = max(gathering, 2 * arrived)  # gloo stages them before the copy
    sampled = model.sampled_keys(zero.shards)
    inside = 0.0
    for matrices in model.matrices:
        whole = _whole_here(matrices, zero, device)
        sampled += int(sample_size(matrices.numel) * whole)
        cut = matrices.num_cut(zero.shards) * matrices.divided_by / zero.shards
        inside += (cut + whole) * matrices.numel * _bracket_share(matrices.numel)
    sampling = masters + 4 * 4 * sampled
    largest = max(m.numel for m in model.matrices) / zero.shards
    bytes_of_key = 5 if device == "cpu" else 8
    # a mask has one bit per weight
    scanning = masters + int(model.weights_here(zero.shards) / 8 + bytes_of_key * inside + largest)
    updated = 4 * model.updated_weights // zero.shards
    return max(gathering, sampling, scanning) + updated + SCORED_TILE_BYTES.get(device, 0)


def _whole_here(group: MatrixGroup, zero: ZeroSettings, device: str) -> float:
    """Return how many matrices that only this rank holds are selected by a bracket; a CPU sorts small ones instead."""
    if device == "cpu" and group.numel <= MOST_AT_ONCE:
        return 0.0
    return (group.count - group.num_cut(zero.shards)) * group.divided_by / zero.shards


def kept_bytes(model: ModelNumbers, zero: ZeroSettings) -> int:
    """Return the bytes of parameters that ZeRO-3 keeps gathered from the forward to the backward pass.

    They are the last ones: within the reuse distance, which counts everything behind them twice, or, with prefetching,
    up to the maximum of live parameters, since DeepSpeed prefetches at every turn of a module until it is reached.
    """
    kept = zero.max_reuse_distance / 2
    if zero.prefetch_bucket_size:
        kept = max(kept, zero.max_live_parameters)
    elements = sum(t.numel * t.count for t in model.tensors)
    return int(model.whole_bytes * min(1.0, kept / max(elements, 1)))


def persistent_bytes(model: ModelNumbers, zero: ZeroSettings) -> int:
    """Return the bytes of parameters small enough to stay gathered all the time."""
    return sum(t.nbytes for t in model.tensors if t.numel <= zero.persistence_threshold)


def _bracket_share(numel: int) -> float:
    """Return the share of a matrix's keys inside its bracket at 50 % sparsity, where it is widest."""
    size = sample_size(numel)
    # of the cut's position in a sample without replacement: p (1 - p) is 0.25 at 50 % sparsity
    deviation = math.sqrt(0.25 / size * (1 - size / numel))
    # two sampled strata more on either side
    return min(1.0, 2 * BRACKET_DEVIATIONS * deviation + 4 / size)


def _trainables_here(model: ModelNumbers, zero: ZeroSettings, *, shared_from_stage: int) -> int:
    """Count the trainable values whose state this rank holds, for state partitioned from a ZeRO stage on."""
    if zero.stage == 3:
        return sum(t.count * zero.shard_of(t) for t in model.tensors if t.trainable)
    is_shared = zero.stage is not None and zero.stage >= shared_from_stage
    if is_shared:
        return math.ceil(model.trainables / zero.world_size)
    return model.trainables


def _optimizer_step_bytes(
    model: ModelNumbers, zero: ZeroSettings, *, groups: Sequence[int] | None, element_size: int, device: str
) -> int:
    """Return the bytes of a group's fp32 gradients and of AdamW's two temporaries of that size.

    A single process on a CPU uses fused AdamW without temporaries, on all gradients at once, copied only if 16-bit.
    """
    if zero.offload_optimizer:
        return 0
    if zero.stage is None and device == "cpu":
        if element_size == 4:
            return 0
        return 4 * model.trainables
    # the optimizer goes through its groups one after another
    largest = model.trainables
    if groups:
        largest = max(groups)
    if zero.stage:
        largest = math.ceil(largest / zero.world_size)
    return 3 * 4 * largest


class _Turn(NamedTuple):
    """Bytes of a module's turn, each of the module that needs most of it.

    Their peaks may be in different modules' turns, but an allocator keeps what one has freed until another needs it.
    """

    gathers: int
    """Gathered parameters."""
    staging: int
    """Buffers of one gather."""
    work: int
    """Temporaries of a pruned layer."""


def _turn(model: ModelNumbers, zero: ZeroSettings, element_size: int) -> _Turn:
    work = max((m.work_bytes for m in model.modules), default=0)
    if zero.stage != 3 or (zero.shards == 1 and not zero.offload_param):  # a single rank uses its shard in place
        return _Turn(gathers=0, staging=0, work=work)
    if zero.copy_ranks == 1:  # frozen parameters are used where their copies are
        return _Turn(gathers=model.trainables * element_size, staging=0, work=work)
    resident = persistent_bytes(model, zero) + kept_bytes(model, zero)
    largest_module = max((m.gathered_bytes for m in model.modules), default=0)
    gathers = min(resident + largest_module, model.whole_bytes)
    staging = 0
    if zero.backend == GLOO and zero.world_size > 1:  # gloo flattens what it sends and receives into its buffers
        ahead = min(zero.prefetch_bucket_size, zero.max_live_parameters) * element_size
        largest = max((m.largest_gather_bytes for m in model.modules), default=0)
        staging = int(max(largest, min(ahead, model.whole_bytes)) * (1 + 1 / zero.world_size))
    return _Turn(gathers=gathers, staging=staging, work=work)
