"""Time and network traffic of a step and of a mask update, from shapes and stated rates: numbers in, numbers out. Bytes
are those a rank receives; a ring all-gather or reduce-scatter of n bytes over w ranks receives n (w - 1) / w, an
all-reduce twice that. Rates are what a machine is assumed to reach, not its data sheet; each names its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pst_ds.core.select import DIGIT_BITS
from pst_ds.planning.machines import Machine
from pst_ds.planning.memory import ModelNumbers, ZeroSettings, kept_bytes, persistent_bytes

FORWARD_BYTES, BACKWARD_BYTES = 10, 40
"""Bytes moved for a pruned weight besides products: M . W once (W, bits, the result, the AND in place), and in the
backward pass M . W again, G, G . W, the masked G and the reads of both by the low-rank products (16-bit values)."""
EXPAND_BYTES = 8
"""More for a weight that is a code, in either pass: the code, unpacked, and the weight that is made of it."""
HISTOGRAMS = 3
"""Exchanges of counts in a mask update: with the scan, and to narrow what is left to a key."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Work of a rank for one optimizer step."""

    tokens: int
    """Tokens of a micro-batch, padding included."""
    sequence: int
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


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank receives, and the collectives they come in."""

    gathers: int
    """Whole weights, for forward and backward passes; of the factors' masters in a mask update."""
    reductions: int
    """Gradients in a step; samples and counts in a mask update."""
    collectives: int

    @property
    def received(self) -> int:
        return self.gathers + self.reductions


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Expected seconds on one rank."""

    step_compute: float
    step_network: float
    step: float
    update_compute: float
    update_network: float
    update: float
    step_received: int
    update_received: int

    def share_of_masks(self, steps: int, updates: int) -> float:
        """Share of a run's time that mask updates take."""
        total = steps * self.step + updates * self.update
        return updates * self.update / total if total else 0.0


def step_flops(model: ModelNumbers, batch: Batch) -> float:
    """Count a micro-batch on one rank: forward 2, dX 2 and G 2 a pruned weight and token, and 2 more to recompute.

    The low-rank products cost FLOPs a weight, whatever the tokens: U V in every forward and backward, and the four
    factor gradients. A teacher is a forward pass, without masks or low-rank products.
    """
    again = 2 if batch.checkpointing else 1
    pruned = model.pruned_weights * batch.tokens * (2 * again + 4)
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
    return Traffic(int(received * others), gradients * batch.micro_batches, collectives * batch.micro_batches)


def update_traffic(model: ModelNumbers, zero: ZeroSettings) -> Traffic:
    """Count one mask update: fp32 masters in one all-gather; sample, counts, ties and statistics in all-reduces."""
    w = zero.shards
    if w == 1:
        return Traffic(0, 0, 0)
    others = (w - 1) / w
    counts = HISTOGRAMS * model.num_matrices * (4 + (1 << DIGIT_BITS)) * 8
    ties = w * model.num_matrices * 8
    reduced = 4 * model.sampled_keys + counts + ties + 3 * 8
    return Traffic(int(4 * model.factor_parameters * others), int(2 * reduced * others), HISTOGRAMS + 4)


def time_plan(model: ModelNumbers, zero: ZeroSettings, batch: Batch, machine: Machine) -> TimePlan:
    """Predict times; where ``machine`` overlaps, a step takes the longer of computing and communicating."""
    again = 2 if batch.checkpointing else 1
    moved = model.pruned_weights * (FORWARD_BYTES * again + BACKWARD_BYTES)
    moved += model.coded_weights * EXPAND_BYTES * (again + 1)
    compute = batch.micro_batches * (step_flops(model, batch) / machine.flops + moved / machine.memory_bytes)
    in_step, in_update = step_traffic(model, zero, batch), update_traffic(model, zero)
    network = machine.transfer_seconds(in_step.received, in_step.collectives, zero.world_size)
    update_compute = math.ceil(model.pruned_weights / zero.shards) * machine.update_seconds
    update_network = machine.transfer_seconds(in_update.received, in_update.collectives, zero.shards)
    return TimePlan(
        step_compute=compute,
        step_network=network,
        step=max(compute, network) if machine.overlaps else compute + network,
        update_compute=update_compute,
        update_network=update_network,
        update=update_compute + update_network,
        step_received=in_step.received,
        update_received=in_update.received,
    )
