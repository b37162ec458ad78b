"""Time and network traffic of a training step and of a mask update, computed from shapes and stated rates.

Bytes are those that a rank receives over either kind of link (:mod:`pst_ds.parallel.links`). Rates are what a machine
is assumed to reach, below its data sheet. The host works ahead of a GPU, so a step takes as long as the slowest of the
device's computation, the network (where that overlaps) and the host; computation waits for exchanges of tokens. A rank
on a CPU is its own host, and takes the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from pst_ds.core.bracket import MAX_COUNTS
from pst_ds.core.select import DIGIT_BITS
from pst_ds.parallel.links import NOTHING, Received
from pst_ds.planning.activations import Trace
from pst_ds.planning.host import LAYER_BACKWARD, LAYER_FORWARD, OPERATOR, Hooks
from pst_ds.planning.machines import Machine
from pst_ds.planning.memory import ZeroSettings, kept_bytes, persistent_bytes
from pst_ds.planning.model_numbers import MatrixGroup, ModelNumbers, ModuleNumbers

HISTOGRAMS = 3
"""Exchanges of counts in a mask update: one with the scan, two that narrow the remaining range down to a key."""


@dataclass(frozen=True, slots=True)
class Launches:
    """Launches of the host, which takes longer in Triton's launcher than in torch's."""

    torch: float = 0
    """Operators of torch, and waits."""
    triton: float = 0

    def __add__(self, other: Launches) -> Launches:
        return Launches(self.torch + other.torch, self.triton + other.triton)

    def __mul__(self, times: float) -> Launches:
        return Launches(self.torch * times, self.triton * times)

    @property
    def total(self) -> float:
        return self.torch + self.triton

    def seconds(self, machine: Machine) -> float:
        return self.torch * machine.launch_seconds + self.triton * machine.triton_launch_seconds


@dataclass(frozen=True, slots=True)
class Counts:
    """Bytes and launches of one implementation besides matrix products, for 16-bit weights and the pattern "matrix".

    Counted from the code; tests count them again: tests/device in torch on an emulated accelerator, tests/kernels with
    Triton kernels on it.
    """

    merge_bytes: float
    """Per weight, to compute M . W in a forward pass."""
    forward_launches: Launches
    """Per forward pass of a layer, including its product."""
    backward_bytes: float
    """Per weight: M . W again, and everything computed from G."""
    layer_launches: Launches
    """Per backward pass of a layer, regardless of its size."""
    band_launches: Launches
    """Per band of rows of a layer's backward pass, including the products of its tile."""
    update_bytes: float
    """Per weight of a rank's shard, in a mask update."""
    update_launches: Launches
    """Per matrix, in a mask update."""
    shared_launches: Launches
    """Per mask update, for all matrices together, including the host's waits."""
    update_instructions: float = 0.0
    """Per scored weight, in instructions of 32 lanes (sm_90); 0 where bytes decide."""


COUNTS = {
    "triton": Counts(
        merge_bytes=4.1,
        forward_launches=Launches(torch=1, triton=1),
        backward_bytes=18.1,
        layer_launches=Launches(torch=20),
        band_launches=Launches(torch=10, triton=1),
        update_bytes=4.3,
        update_launches=Launches(),
        shared_launches=Launches(torch=58, triton=10),
        update_instructions=79.8,
    ),
    "torch": Counts(
        merge_bytes=22.1,
        forward_launches=Launches(torch=9),
        backward_bytes=54.4,
        layer_launches=Launches(torch=20),
        band_launches=Launches(torch=22),
        update_bytes=461,
        update_launches=Launches(torch=104),
        shared_launches=Launches(torch=107),
    ),
    "native": Counts(
        merge_bytes=10,
        forward_launches=Launches(),
        backward_bytes=40,
        layer_launches=Launches(),
        band_launches=Launches(),
        update_bytes=0,
        update_launches=Launches(),
        shared_launches=Launches(),
    ),
}
"""By implementation: Triton kernels (NVIDIA from sm_80), torch's operators only, or C++ loops on a CPU, which launch
nothing, keep a band in the cache, and whose mask update has a measured rate."""

UNIT_UPDATES = {"block": (3.2, 146), "n:m": (7.2, 330), "row": (7, 280)}
"""The same update_bytes and update_instructions of kernels for units of several weights, N:M while sparsity grows."""
EXPAND_BYTES = 8
"""Additional bytes per quantised weight in either pass: the value, unpacked, and the dequantised weight."""
REDUCE_BYTES = 14
"""Bytes per trainable value and micro-batch: its 16-bit gradient is copied into a bucket, ordered by rank, divided by
the number of ranks, and sent (DeepSpeed 0.19.8, stage 3)."""
REDUCE_LAUNCHES = 3
"""Launches per trainable tensor and micro-batch: into the bucket, this rank's shard out of it, and the bucket's own."""
FLAT_BYTES = 16
"""Bytes per value of the flat factors and micro-batch: copied to where the layers' factors are views (4), gradients
added to those of the views (6), taken from there (4), which become zero (2)."""
FLAT_LAUNCHES = 3
"""The same in launches per flat parameter. Autograd adds the gradient of each factor in one more."""
STEP_BYTES = 42
"""Bytes per trainable value of a rank's shard: the norm of its gradient, of a copy in fp64 (18); the flat gradient (4),
in fp32 (6), clipped (8); a 16-bit copy of the updated value (6) (DeepSpeed 0.19.8, stage 3)."""
OPTIMIZER_BYTES = STEP_BYTES + 28
"""STEP_BYTES and the bytes of a fused AdamW, which reads four fp32 numbers and writes three."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Work of a rank for one optimizer step."""

    tokens: int
    """Tokens of a micro-batch, including padding."""
    sequence: int
    """Tokens that attention covers, over all ranks that share a sequence."""
    micro_batches: int = 1
    recomputed: float = 0.0
    """Share of the blocks that are computed again in the backward pass."""
    teacher_weights: int = 0
    """Weights in the linear layers of a distillation teacher; 0 without one."""
    own_teacher: bool = False
    """True if the model is its own teacher, so that its weights are gathered once more."""
    trace: Trace = field(default_factory=Trace)
    """Gathers and operators of a micro-batch. If it is empty, every pass is assumed to gather every parameter."""
    shared_by: int = 1
    """Ranks that share a sequence."""
    element_size: int = 2
    """Bytes of a weight, gradient or activation."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank receives, and the number of collectives."""

    gathers: Received = NOTHING
    """Weights, for forward and backward passes; fp32 masters of the factors and then new masks in a mask update."""
    reductions: Received = NOTHING
    """Gradients in a step; samples and counts in a mask update."""
    exchanged: Received = NOTHING
    """Queries, keys, values and attention outputs of shared sequences; tokens on their way to experts and back."""
    collectives: int = 0
    hops: int = 0
    """Hops of all collectives between nodes, or between the ranks of one."""

    @property
    def received(self) -> Received:
        return self.gathers + self.reductions + self.exchanged

    def seconds(self, machine: Machine) -> float:
        """Return the time of the collectives but for exchanges, each kind at the rate of its slower link."""
        transfers = machine.link_seconds(self.gathers) + machine.link_seconds(self.reductions)
        return transfers + self.hops * machine.latency


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Expected seconds on one rank, and bytes that it receives."""

    step_compute: float
    step_network: float
    step_launching: float
    """The host's time to launch a step, if launches were all it does."""
    step_host: float
    """The host's time for a step: launches, or Python where that takes longer, and DeepSpeed's hooks."""
    step_bound: Literal["host", "products", "network"]
    """What takes longest in a step."""
    step: float
    full_step: float
    """A step of full fine-tuning of the same model, predicted the same way."""
    update_compute: float
    update_network: float
    update: float
    step_received: int
    update_received: int
    step_between_nodes: int = 0
    """The part of ``step_received`` that comes from other nodes."""
    update_between_nodes: int = 0

    @property
    def over_full(self) -> float:
        """A step with a mask update, relative to a step of full fine-tuning."""
        if not self.full_step:
            return 0.0
        return (self.step + self.update) / self.full_step

    def share_of_masks(self, steps: int, updates: int) -> float:
        """Return the share of a run's time that mask updates take."""
        total = steps * self.step + updates * self.update
        if not total:
            return 0.0
        return updates * self.update / total


def step_flops(model: ModelNumbers, batch: Batch) -> float:
    """Count the FLOPs of a micro-batch on one rank.

    Per pruned weight and token: forward 2, dX 2 and G 2, and 2 more to recompute. The low-rank products cost FLOPs per
    weight, regardless of the tokens (each expert is assumed to have some): U V in every forward and backward pass, and
    the four factor gradients. A teacher adds a forward pass without masks or low-rank products.
    """
    forwards = 1 + batch.recomputed
    pruned = model.multiplied_weights * batch.tokens * (2 * forwards + 4)
    update_products = 2 * model.update_rank * (forwards + 1)
    factor_gradients = 4 * (model.score_rank + model.update_rank)
    low_rank = model.pruned_weights * (update_products + factor_gradients)
    dense = model.dense_weights * batch.tokens * 4  # forward and dX: a dense weight is frozen
    taught = 0
    if batch.teacher_weights:
        taught = 2  # a forward pass
    teacher = batch.teacher_weights * batch.tokens * taught
    # two products: queries and keys, probabilities and values; a causal mask halves them
    attention = model.attention_width * batch.tokens * batch.sequence * 2 * (2 * forwards + 4 + taught) / 2
    return pruned + low_rank + dense + teacher + attention


def step_traffic(model: ModelNumbers, zero: ZeroSettings, batch: Batch) -> Traffic:
    """Count the traffic of one optimizer step.

    Stage 3 gathers a module for its forward, its recomputed forward and its backward turn; DeepSpeed 0.19.8 releases
    frozen parameters after recomputing regardless of the reuse distance. Parameters kept from the forward to the
    backward pass are gathered once less. A model that is its own teacher needs one more pass. Frozen parameters come
    from the ranks that share a copy of them, if there is one.
    """
    if zero.world_size == 1:
        return Traffic()
    everyone = zero.group(zero.world_size)
    gradients = model.trainables * batch.element_size
    buckets = math.ceil(model.trainables / max(zero.reduce_bucket_size, 1))
    if zero.stage != 3:
        # 0 all-reduces gradients; 1 and 2 reduce them to their owners, who send the parameters back. Stage 2 keeps
        # only the owners' gradients, and so reduces those of every micro-batch
        reductions = 1
        if zero.stage == 2:
            reductions = batch.micro_batches
        exchanges = reductions + 1
        return Traffic(
            reductions=everyone.gathered(exchanges * gradients),
            collectives=exchanges * buckets,
            hops=exchanges * buckets * everyone.hops,
        )
    passes = 2 + batch.recomputed
    modules = sum(m.count for m in model.modules)
    collectives = (batch.trace.gathers or round(passes * modules)) + batch.own_teacher * modules
    # with copies of the frozen parameters, only what trains is gathered from all ranks
    among_all = collectives
    if zero.copy_ranks:
        trained_modules = model.num_layers
        if model.flat_parameters:
            trained_modules = 1  # one module holds all factors
        among_all = batch.trace.trained_gathers or round(passes * trained_modules)
    copies = zero.group(max(1, zero.copy_ranks))
    among_copies = 0
    if zero.copy_ranks > 1:
        among_copies = collectives
    # a divided stack's gradients are reduced among the ranks that hold the same experts
    of_owners = model.divided_bytes(trained=True) * batch.micro_batches
    degree = model.divided_by
    reduced = everyone.gathered(gradients * batch.micro_batches - of_owners)
    reduced += everyone.owners(degree).gathered(of_owners)
    # queries, keys, values and attention outputs have at most the width of all heads; a teacher has one more pass
    per_token = batch.element_size * (passes + (batch.teacher_weights > 0))
    tokens = batch.micro_batches * batch.tokens
    exchanged = zero.group(batch.shared_by).exchanged(tokens * per_token * 4 * model.attention_width)
    exchanged += zero.group(degree).exchanged(tokens * per_token * 2 * model.dispatch_width)  # there and back
    return Traffic(
        gathers=_gathers(model, zero, batch, passes=passes, gradients=passes * gradients),
        reductions=reduced,
        exchanged=exchanged,
        collectives=batch.micro_batches * (among_all + among_copies + buckets),
        hops=batch.micro_batches * ((among_all + buckets) * everyone.hops + among_copies * copies.hops),
    )


def _gathers(model: ModelNumbers, zero: ZeroSettings, batch: Batch, *, passes: float, gradients: float) -> Received:
    """Count the bytes that ZeRO-3 gathers in a step. ``gradients``: bytes of what trains, in all passes."""
    everyone = zero.group(zero.world_size)
    degree = model.divided_by
    trace = batch.trace
    divided = passes * model.divided_bytes(trained=False)
    of_owners = passes * model.divided_bytes(trained=True)
    traced = trace.gathered or passes * model.whole_bytes
    if degree > 1 and trace.in_stacks:
        # the trace is of whole stacks, of which a rank gathers its experts only
        divided = trace.in_stacks // degree
        traced -= trace.in_stacks - divided
    gathered = max(traced - kept_bytes(model, zero), model.whole_bytes) + batch.own_teacher * model.whole_bytes
    of_all = traced - divided
    of_copies = 0.0
    if zero.copy_ranks:
        trained = trace.trained - degree * of_owners if trace.trained else gradients - of_owners
        of_all = max(0.0, trained)
        of_copies = traced - divided - of_all
    received = everyone.gathered(of_all)
    received += everyone.owners(degree).gathered(of_owners if zero.copy_ranks == 1 else divided)
    received += zero.group(max(1, zero.copy_ranks)).gathered(of_copies)
    # optimizers change the parameters that are never released: they are gathered anew, once per step
    after_step = everyone.gathered(persistent_bytes(model, zero))
    # kept parameters are missing and a teacher's are added in the same proportions as the traced ones
    return received * (gathered * batch.micro_batches / traced) + after_step


def update_traffic(model: ModelNumbers, zero: ZeroSettings) -> Traffic:
    """Count one mask update: fp32 masters in one all-gather; sample, counts, ties and statistics in all-reduces.

    A matrix that one rank holds adds a single number. Copies of the masks are then made anew, by gathers that take the
    place of others in the next step.
    """
    ranks = zero.shards
    if ranks == 1:
        return Traffic()
    everyone = zero.group(ranks)
    cut = model.num_cut(ranks)
    # int64 counts: four of a bracket and a histogram, which has fewer bins if many matrices share the exchange
    counts = HISTOGRAMS * cut * (4 + min(1 << DIGIT_BITS, MAX_COUNTS // max(1, cut))) * 8
    numbers = (ranks * cut + model.num_matrices - cut) * 8
    reduced = 4 * model.sampled_keys(ranks) + counts + numbers + 3 * 8
    of_owners = 4 * sum(t.numel * t.count for t in model.tensors if t.divided_by > 1 and t.kind == "factor")
    gathered = 4 * model.factor_parameters - of_owners
    if zero.copy_ranks:
        gathered += model.copied_bytes(zero.copy_ranks, "mask")
    collectives = HISTOGRAMS + 4
    return Traffic(
        gathers=everyone.gathered(gathered) + everyone.owners(model.divided_by).gathered(of_owners),
        reductions=everyone.gathered(2 * reduced),  # an all-reduce is a reduce-scatter and an all-gather
        collectives=collectives,
        hops=collectives * everyone.hops,
    )


def time_plan(model: ModelNumbers, zero: ZeroSettings, batch: Batch, machine: Machine) -> TimePlan:
    """Predict the times of a step and of a mask update on ``machine``."""
    forwards = 1 + batch.recomputed
    launches = Launches()
    host = 0.0
    moved: float = batch.trace.moved + model.coded_weights * EXPAND_BYTES * (forwards + 1)
    for matrices in model.matrices:
        counts = _counts(machine, matrices)
        moved += matrices.numel * matrices.count * (counts.merge_bytes * forwards + counts.backward_bytes)
    for layers in model.modules:
        if not layers.bands:
            continue
        counts = _counts(machine, layers)
        # each expert is computed like a layer, unless kernels compute groups of them together
        num_computed = layers.experts
        bands = layers.bands
        if layers.groups and machine.code == "triton":
            num_computed = 1
            bands = layers.groups
        each = (
            counts.forward_launches * forwards + counts.layer_launches
        ) * num_computed + counts.band_launches * bands
        python = (LAYER_FORWARD * forwards + LAYER_BACKWARD) * num_computed * machine.host_factor
        launches += each * layers.count
        # Python was measured for layers of one band; launches of many bands take longer
        host += max(each.seconds(machine), python) * layers.count
    moved += FLAT_BYTES * _flat_values(model)
    of_flats = Launches(FLAT_LAUNCHES * model.flat_parameters + model.flattened_factors)
    launches += of_flats
    host += _operator_seconds(of_flats, machine)
    in_step = step_traffic(model, zero, batch)
    in_update = update_traffic(model, zero)
    step = _step_seconds(
        model,
        zero,
        batch,
        machine,
        traffic=in_step,
        flops=step_flops(model, batch),
        moved=moved,
        launches=launches,
        host=host,
    )
    update_compute = _update_seconds(model, zero, machine)
    update_network = in_update.seconds(machine)
    return TimePlan(
        step_compute=step.compute,
        step_network=step.network + step.exchanges,
        step_launching=step.launching,
        step_host=step.host,
        step_bound=step.bound,
        step=step.together(machine),
        full_step=_full_step(model, zero, batch, machine),
        update_compute=update_compute,
        update_network=update_network,
        update=update_compute + update_network,
        step_received=round(in_step.received.total),
        update_received=round(in_update.received.total),
        step_between_nodes=round(in_step.received.between),
        update_between_nodes=round(in_update.received.between),
    )


@dataclass(frozen=True, slots=True)
class _StepSeconds:
    """Seconds of a step's parts."""

    compute: float
    network: float
    launching: float
    host: float
    exchanges: float
    """Exchanges of tokens, queries, keys and values, for which computation waits."""

    @property
    def bound(self) -> Literal["host", "products", "network"]:
        """What takes longest."""
        network = self.network + self.exchanges
        if self.host > max(self.compute, network):
            return "host"
        if network > self.compute:
            return "network"
        return "products"

    def together(self, machine: Machine) -> float:
        """Return the seconds of the whole step: parts that overlap take as long as the slowest."""
        computing = max(self.compute, self.host)  # a GPU's work waits in its queue, and the host does not wait for it
        if machine.device == "cpu":
            computing = self.compute + self.host
        if machine.overlaps:
            return max(computing, self.network) + self.exchanges
        return computing + self.network + self.exchanges


def _step_seconds(
    model: ModelNumbers,
    zero: ZeroSettings,
    batch: Batch,
    machine: Machine,
    *,
    traffic: Traffic,
    flops: float,
    moved: float,
    launches: Launches,
    host: float,
) -> _StepSeconds:
    """Return the seconds of a step.

    ``flops``, ``moved``: FLOPs and bytes of a micro-batch without gradients and optimizer; ``launches``, ``host``:
    launches of a micro-batch that ``batch`` does not count, and the host's seconds for them.
    """
    reduced = 0
    if zero.world_size > 1:
        reduced = REDUCE_BYTES * batch.micro_batches
    owners = 1
    if zero.stage:
        # ZeRO partitions the optimizer state
        owners = zero.world_size
    trained = model.trainables * (reduced + OPTIMIZER_BYTES / owners)
    compute = batch.micro_batches * (flops / machine.flops + moved / machine.memory_bytes)
    traced = Launches(batch.trace.launches)
    in_hooks = Launches(REDUCE_LAUNCHES * model.num_trainables * batch.micro_batches + traffic.collectives)
    launches = (launches + traced) * batch.micro_batches + in_hooks
    hooks = _hooks(model, zero, batch).seconds * machine.host_factor
    host = (host + _operator_seconds(traced, machine)) * batch.micro_batches + max(hooks, in_hooks.seconds(machine))
    return _StepSeconds(
        compute=compute + trained / machine.memory_bytes,
        network=traffic.seconds(machine),
        launching=launches.seconds(machine),
        host=host,
        exchanges=machine.link_seconds(traffic.exchanged),
    )


def _operator_seconds(launches: Launches, machine: Machine) -> float:
    """Return the host's seconds for operators outside the pruned layers, the longer of their Python and launches."""
    return max(launches.seconds(machine), launches.total * OPERATOR * machine.host_factor)


def _hooks(model: ModelNumbers, zero: ZeroSettings, batch: Batch) -> Hooks:
    """Count the calls of DeepSpeed's hooks in a step."""
    tensors = model.num_trainables
    if zero.stage is None:
        return Hooks()
    if zero.stage != 3:
        return Hooks(optimizer_tensors=tensors)
    modules = sum(m.count for m in model.modules)
    parameters = sum(t.count for t in model.tensors)
    passes = 2 + batch.recomputed
    # a model without a trace is assumed to have a turn of every module with parameters in every pass
    fetches = batch.trace.fetches or passes * modules
    releases = batch.trace.releases or passes * modules
    parameter_turns = batch.trace.parameter_turns or passes * parameters
    if batch.own_teacher:
        # one more forward pass
        fetches += modules
        releases += modules
        parameter_turns += parameters
    return Hooks(
        fetches=batch.micro_batches * fetches,
        releases=batch.micro_batches * releases,
        parameter_turns=batch.micro_batches * parameter_turns,
        reduced_tensors=batch.micro_batches * tensors,
        optimizer_tensors=tensors,
    )


def _flat_values(model: ModelNumbers) -> int:
    """Return the values of the flat parameters; 0 if each factor is a parameter."""
    if not model.flat_parameters:
        return 0
    return sum(t.numel * t.count for t in model.tensors if t.kind == "factor" and not t.in_stack)


def _update_seconds(model: ModelNumbers, zero: ZeroSettings, machine: Machine) -> float:
    """Time a mask update without its collectives: by the measured rate, or the slowest of bytes, instructions and
    launches."""
    weights = math.ceil(model.weights_here(zero.shards))
    if machine.update_seconds:
        return weights * machine.update_seconds
    seconds = 0.0
    launches = Launches()
    shared = Launches()
    for matrices in model.matrices:
        counts = _counts(machine, matrices)
        moved = counts.update_bytes
        instructions = counts.update_instructions
        if counts is COUNTS["triton"] and matrices.kind in UNIT_UPDATES:
            moved, instructions = UNIT_UPDATES[matrices.kind]
        bound = moved / machine.memory_bytes
        if machine.instructions:
            bound = max(bound, instructions / machine.instructions)
        seconds += bound * matrices.numel * matrices.count * matrices.divided_by / zero.shards
        launches += counts.update_launches * matrices.count
        # all matrices are selected in one update; two implementations share the waits of the longer one
        shared = max(shared, counts.shared_launches, key=lambda some: some.total)
    launches += shared
    return max(seconds, launches.seconds(machine))


def _counts(machine: Machine, served: MatrixGroup | ModuleNumbers) -> Counts:
    """Return the counts of what computes these matrices or layers on ``machine``."""
    if machine.code == "triton" and not served.by_kernels:
        return COUNTS["torch"]
    return COUNTS[machine.code]


def _full_step(model: ModelNumbers, zero: ZeroSettings, batch: Batch, machine: Machine) -> float:
    """Time a step of full fine-tuning of the same model.

    PST computes the gradient of a pruned weight too; weights that PST leaves dense need one more product.
    """
    plain = tuple(
        replace(t, numel=t.parameters // t.count, element_size=2, stands_for=None, trainable=True)
        for t in model.tensors
        if t.kind == "weight" and t.stands_for != 0  # scales of a quantised weight are not there without it
    )
    full = replace(model, tensors=plain, score_rank=0, update_rank=0)
    gathered = int(batch.trace.gathered * full.whole_bytes / model.whole_bytes)
    # its modules have fewer parameters: no masks and no factors
    share = sum(t.count for t in full.tensors) / sum(t.count for t in model.tensors)
    turns = round(batch.trace.parameter_turns * share)
    trace = replace(batch.trace, gathered=gathered, parameter_turns=turns)
    batch = replace(batch, trace=trace, teacher_weights=0, own_teacher=False)
    zero = replace(zero, copy_ranks=0)  # which would be made anew in every step
    flops = step_flops(full, batch) + 2 * full.dense_weights * batch.tokens
    products = 3 + batch.recomputed  # forward, once more where it is recomputed, and two gradients
    launches = Launches(full.num_layers * products)
    seconds = _step_seconds(
        full,
        zero,
        batch,
        machine,
        traffic=step_traffic(full, zero, batch),
        flops=flops,
        moved=batch.trace.moved,
        launches=launches,
        host=_operator_seconds(launches, machine),
    )
    return seconds.together(machine)
