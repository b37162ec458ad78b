"""Time and network traffic of a step and of a mask update, from shapes and stated rates: numbers in, numbers out. Bytes
are those a rank receives; a ring all-gather or reduce-scatter of n bytes over w ranks receives n (w - 1) / w, an
all-reduce twice that. Rates are what a machine is assumed to reach, not its data sheet; each names its source. A step
takes the longest of what the device computes, the network brings (where that overlaps) and the host launches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pst_ds.core.bracket import MAX_COUNTS
from pst_ds.core.select import DIGIT_BITS
from pst_ds.planning.counts import (
    COUNTS,
    EXPAND_BYTES,
    OPTIMIZER_BYTES,
    REDUCE_BYTES,
    REDUCE_LAUNCHES,
)
from pst_ds.planning.machines import Machine
from pst_ds.planning.memory import ModelNumbers, ZeroSettings, kept_bytes, persistent_bytes

HISTOGRAMS = 3
"""Exchanges of counts in a mask update: with the scan, and to narrow what is left to a key."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Work of a rank for one optimizer step."""

    tokens: int
    """Tokens of a micro-batch, padding included."""
    sequence: int
    """Tokens that attention is over; those of several ranks if these share a sequence."""
    micro_batches: int = 1
    checkpointing: bool = False
    teacher_weights: int = 0
    """Weights in the linear layers of the teacher of a distillation; 0 for none."""
    own_teacher: bool = False
    """The teacher is the model itself, whose weights are gathered for it once more."""
    gathered: int = 0
    """Bytes that ZeRO-3 gathers in a micro-batch if nothing is kept, and in how many ``gathers``, as traced; 0 where no
    trace can be had: every parameter is taken to be fetched in every pass then."""
    gathers: int = 0
    moved: int = 0
    """Bytes that operators outside the pruned layers move in a micro-batch, and how many ``launches``, as traced."""
    launches: int = 0
    shared_by: int = 1
    """Ranks that a sequence is cut over."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank receives, and the collectives they come in."""

    gathers: int
    """Whole weights, for forward and backward passes; of the factors' masters in a mask update."""
    reductions: int
    """Gradients in a step; samples and counts in a mask update."""
    collectives: int
    exchanged: int = 0
    """Queries, keys, values and what attention makes of them, between ranks that share sequences."""

    @property
    def received(self) -> int:
        return self.gathers + self.reductions + self.exchanged


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Expected seconds on one rank."""

    step_compute: float
    step_network: float
    step_launching: float
    """The host's time to launch a step."""
    step: float
    full_step: float
    """A step of full fine-tuning of the same model, counted alike."""
    update_compute: float
    update_network: float
    update: float
    step_received: int
    update_received: int

    @property
    def over_full(self) -> float:
        """Return a step with a mask update over one of full fine-tuning."""
        return (self.step + self.update) / self.full_step if self.full_step else 0.0

    def share_of_masks(self, steps: int, updates: int) -> float:
        """Share of a run's time that mask updates take."""
        total = steps * self.step + updates * self.update
        return updates * self.update / total if total else 0.0


def step_flops(model: ModelNumbers, batch: Batch) -> float:
    """Count a micro-batch on one rank: forward 2, dX 2 and G 2 a pruned weight and token, and 2 more to recompute.

    The low-rank products cost FLOPs a weight, whatever the tokens (each expert is taken to have some): U V in every
    forward and backward, and the four factor gradients. A teacher is a forward pass without masks or low-rank products.
    """
    again = 2 if batch.checkpointing else 1
    pruned = model.multiplied_weights * batch.tokens * (2 * again + 4)
    low_rank = model.pruned_weights * (2 * model.update_rank * (again + 1) + 4 * (model.score_rank + model.update_rank))
    dense = model.dense_weights * batch.tokens * 4
    taught = 2 if batch.teacher_weights else 0
    teacher = batch.teacher_weights * batch.tokens * taught
    attention = model.attention_width * batch.tokens * batch.sequence * 2 * (2 * again + 4 + taught) / 2  # causal: half
    return pruned + low_rank + dense + teacher + attention


def step_traffic(model: ModelNumbers, zero: ZeroSettings, batch: Batch, element_size: int = 2) -> Traffic:
    """Count one optimizer step. Stage 3 gathers a module for its forward and its backward turn, and for its recomputed
    forward in between; DeepSpeed 0.19.8 lets go of frozen parameters after that whatever the reuse distance. Those of
    the module that ends a checkpointed block are still there from its backward turn, and what is kept from the forward
    to the backward pass is fetched once less. The model as its own teacher takes one more pass."""
    w = zero.world_size
    if w == 1:
        return Traffic(0, 0, 0)
    others = (w - 1) / w
    gradients = int(model.trainables * element_size * others)
    buckets = math.ceil(model.trainables / max(zero.reduce_bucket_size, 1))
    if zero.stage != 3:
        # 0 all-reduces gradients; 1 and 2 reduce them to their owners, who send the parameters back
        return Traffic(0, 2 * gradients, 2 * buckets)
    passes, modules = 2 + batch.checkpointing, sum(m.count for m in model.modules)
    gathered = max((batch.gathered or passes * model.whole_bytes) - kept_bytes(model, zero), model.whole_bytes)
    gathered += batch.own_teacher * model.whole_bytes
    received = batch.micro_batches * gathered + persistent_bytes(model, zero)  # the latter after the optimizer's step
    collectives = (batch.gathers or passes * modules) + batch.own_teacher * modules + buckets
    exchanged = batch.micro_batches * _exchanged(model, batch, element_size)
    return Traffic(
        int(received * others), gradients * batch.micro_batches, collectives * batch.micro_batches, exchanged
    )


def _exchanged(model: ModelNumbers, batch: Batch, element_size: int) -> int:
    """Count what attention on a part of the heads and all of a sequence brings a rank in a micro-batch.

    Queries, keys, values and results have the width of all heads each, at most; a pass forward, one to recompute, one
    back, and one for a teacher.
    """
    passes = 2 + batch.checkpointing + (batch.teacher_weights > 0)
    width = 4 * model.attention_width * element_size * passes
    return batch.tokens * width * (batch.shared_by - 1) // batch.shared_by


def update_traffic(model: ModelNumbers, zero: ZeroSettings) -> Traffic:
    """Count one mask update: fp32 masters in one all-gather; sample, counts, ties and statistics in all-reduces.

    Of matrices that lie whole on a rank there is a number each.
    """
    w = zero.shards
    if w == 1:
        return Traffic(0, 0, 0)
    others = (w - 1) / w
    cut = model.num_cut(w)
    counts = HISTOGRAMS * cut * (4 + min(1 << DIGIT_BITS, MAX_COUNTS // max(1, cut))) * 8
    numbers = (w * cut + model.num_matrices - cut) * 8
    reduced = 4 * model.sampled_keys(w) + counts + numbers + 3 * 8
    return Traffic(int(4 * model.factor_parameters * others), int(2 * reduced * others), HISTOGRAMS + 4)


def time_plan(model: ModelNumbers, zero: ZeroSettings, batch: Batch, machine: Machine) -> TimePlan:
    """Predict times; where ``machine`` overlaps, a step takes the longest of computing, communicating and launching."""
    compute, launches = _step_compute(model, zero, batch, machine), _step_launches(model, batch, machine)
    in_step, in_update = step_traffic(model, zero, batch), update_traffic(model, zero)
    network = machine.transfer_seconds(in_step.received, in_step.collectives, zero.world_size)
    launching = (launches + in_step.collectives) * machine.launch_seconds
    update_compute = _update_seconds(model, zero, machine)
    update_network = machine.transfer_seconds(in_update.received, in_update.collectives, zero.shards)
    return TimePlan(
        step_compute=compute,
        step_network=network,
        step_launching=launching,
        step=_together(compute, network, launching, machine),
        full_step=_full_step(model, zero, batch, machine),
        update_compute=update_compute,
        update_network=update_network,
        update=update_compute + update_network,
        step_received=in_step.received,
        update_received=in_update.received,
    )


def _together(compute: float, network: float, launching: float, machine: Machine) -> float:
    return max(compute, network, launching) if machine.overlaps else max(compute, launching) + network


def _trained_bytes(model: ModelNumbers, zero: ZeroSettings, batch: Batch) -> float:
    """Bytes that gradients and the optimizer move in a step."""
    reduced = REDUCE_BYTES * batch.micro_batches if zero.world_size > 1 else 0
    return model.trainables * (reduced + OPTIMIZER_BYTES / (zero.world_size if zero.stage else 1))


def _step_compute(model: ModelNumbers, zero: ZeroSettings, batch: Batch, machine: Machine) -> float:
    counts, again = COUNTS[machine.code], 2 if batch.checkpointing else 1
    moved = model.pruned_weights * (counts.merge_bytes * again + counts.backward_bytes) + batch.moved
    moved += model.coded_weights * EXPAND_BYTES * (again + 1)
    each = step_flops(model, batch) / machine.flops + moved / machine.memory_bytes
    return batch.micro_batches * each + _trained_bytes(model, zero, batch) / machine.memory_bytes


def _step_launches(model: ModelNumbers, batch: Batch, machine: Machine) -> int:
    counts, again = COUNTS[machine.code], 2 if batch.checkpointing else 1
    launches = model.num_layers * (counts.forward_launches * again + counts.layer_launches)
    launches += model.num_bands * counts.band_launches + batch.launches + REDUCE_LAUNCHES * model.num_trainables
    return batch.micro_batches * launches


def _update_seconds(model: ModelNumbers, zero: ZeroSettings, machine: Machine) -> float:
    """Time of a mask update beside its collectives: the rate measured, or the longest of bytes, instructions and
    launches."""
    weights = math.ceil(model.pruned_weights / zero.shards)
    if machine.update_seconds:
        return weights * machine.update_seconds
    counts = COUNTS[machine.code]
    bound = counts.update_bytes / machine.memory_bytes
    if machine.instructions:
        bound = max(bound, counts.update_instructions / machine.instructions)
    launches = model.num_matrices * counts.update_launches + counts.shared_launches
    return max(weights * bound, launches * machine.launch_seconds)


def _full_step(model: ModelNumbers, zero: ZeroSettings, batch: Batch, machine: Machine) -> float:
    """Time a step in which every parameter of the same model is trained, and none is masked.

    The gradient of a pruned weight is a product in either; that of a weight which PST leaves alone is one more.
    """
    plain = tuple(
        replace(
            t, numel=t.numel if t.stands_for is None else t.stands_for, element_size=2, stands_for=None, trainable=True
        )
        for t in model.tensors
        if not (t.is_mask or t.is_scales or t.is_factor)
    )
    full = replace(model, tensors=plain, score_rank=0, update_rank=0)
    gathered = int(batch.gathered * full.whole_bytes / model.whole_bytes)
    batch = replace(batch, gathered=gathered, teacher_weights=0, own_teacher=False)
    flops = step_flops(full, batch) + 2 * full.dense_weights * batch.tokens
    each = flops / machine.flops + batch.moved / machine.memory_bytes
    compute = batch.micro_batches * each + _trained_bytes(full, zero, batch) / machine.memory_bytes
    traffic = step_traffic(full, zero, batch)
    network = machine.transfer_seconds(traffic.received, traffic.collectives, zero.world_size)
    again = 2 if batch.checkpointing else 1
    products = full.num_layers * (again + 2)
    launches = batch.micro_batches * (products + batch.launches + REDUCE_LAUNCHES * full.num_trainables)
    return _together(compute, network, (launches + traffic.collectives) * machine.launch_seconds, machine)
