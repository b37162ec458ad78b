"""Plan a run from names and shapes: what is pruned and trained, memory per rank, time, and whether it fits."""

import copy
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from pst_ds.checkpoint.format import SCALE_BYTES, most_bytes
from pst_ds.config.one_shot import CHANNELS
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import load_run_or_folder
from pst_ds.core.documents import is_long
from pst_ds.data.tasks import task_of
from pst_ds.errors import InputError
from pst_ds.json_text import JsonObject
from pst_ds.nn.addition import extra_tokens_of
from pst_ds.nn.base_model import DTYPES, Pretrained
from pst_ds.nn.checkpointing import blocks_of
from pst_ds.nn.flat_factors import flat_sizes
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.tables.embedding import pst_embeddings
from pst_ds.parallel.ds_config import load_deepspeed_config, place_frozen, zero_stage
from pst_ds.parallel.launch import launch_environment
from pst_ds.planning.activations import Trace, UntraceableError, trace_micro_batch
from pst_ds.planning.cut import cut_plan
from pst_ds.planning.machines import Machine, machine_of
from pst_ds.planning.memory import MemoryPlan, ZeroSettings, memory_plan, zero_settings
from pst_ds.planning.model_numbers import ModelNumbers
from pst_ds.planning.shapes import block_sizes, model_numbers
from pst_ds.planning.start import Cost, StartData, start_plan
from pst_ds.planning.time import Batch, TimePlan, step_flops, time_plan
from pst_ds.planning.verdict import Need, Verdict, Work, need_of_rank, verdict
from pst_ds.train.model import frozen_bytes, head_names, parameter_groups
from pst_ds.train.objective import teacher_shapes
from pst_ds.train.one_shot.start import one_shot_config
from pst_ds.train.prepare import require_engine, require_trainable, resolved_deepspeed_config
from pst_ds.train.resolved import ResolvedRun, RunShapes, frozen_grid, grid_of_run, resolve
from pst_ds.train.stages import require_stages


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Machine and assumptions of a plan."""

    ranks: int | None = None
    """Number of ranks. None for the launcher's, or 1."""
    machine: str | None = None
    """Name of a machine, or path of a TOML file with its rates. None for "cpu" on a host without GPU and with a core
    for every rank, else "h100"."""
    no_data: bool = False
    """True to skip data and tokenizer; the run then needs ``train.num_steps``."""
    memory: int = 0
    """Bytes of memory per rank; 0 for the machine's."""
    trace: Trace | None = None
    """Trace of the same micro-batch from an earlier plan, for any number of ranks. None to make one."""


@dataclass(frozen=True, slots=True)
class PlannedData:
    """The examples to train on."""

    num_examples: int | None
    """None for a plan without data."""
    remark: str
    """What a user should know about them; "" for nothing."""


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """A layer to prune."""

    name: str
    out_features: int
    in_features: int
    matrices: int
    experts: int
    factor_parameters: int


@dataclass(frozen=True, slots=True)
class PlannedEmbedding:
    """An embedding with a low-rank update."""

    name: str
    rows: int
    width: int
    factor_parameters: int


@dataclass(frozen=True, slots=True)
class PlannedSchedule:
    """The sparsity schedule."""

    final_sparsity: float
    mask_updates: int
    first_update: int | None
    """Step of the first mask update; None without any."""
    last_update: int | None
    sparsity_at: dict[int, float]
    """Target sparsity at each eighth of the run, by step."""


@dataclass(frozen=True, slots=True)
class PlannedRounding:
    """The quantisation of weights during training."""

    grid: str
    start: int
    """First step with quantised weights."""
    searches: int
    """Searches of scales over the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A planned run. Bytes are per rank unless named otherwise."""

    run: RunConfig
    ranks: int
    zero_stage: int | None
    """None for one process without DeepSpeed."""
    micro_batch_size: int
    num_steps: int
    data: PlannedData
    unit: str
    """Plural noun for the examples."""
    machine: str
    num_blocks: int
    """Blocks of the model that can recompute their activations."""
    copy_ranks: int
    """Ranks that share a second copy of frozen weights and masks; 0 without one, 1 for whole copies."""
    trained_in_full: list[str]
    """Names of the modules whose weights all train."""
    layers: list[PlannedLayer]
    updated_embeddings: list[PlannedEmbedding]
    parameters: int
    trained_parameters: int
    pruned_parameters: int
    schedule: PlannedSchedule | None
    rounding: PlannedRounding | None
    remarks: list[str]
    memory: MemoryPlan
    trace: Trace | None
    """None if the model cannot be traced without values; ``memory`` then lacks the activations."""
    mask_bytes: int
    """Bytes of all masks, over all ranks."""
    scale_bytes: int
    """Bytes of all scales of quantised weights, over all ranks."""
    checkpoint_bytes: int
    """Most bytes of a checkpoint, over all ranks."""
    time: TimePlan
    finetuning: "Plan | None"
    """The fine-tuning before the run; None without one."""
    start_cost: Cost | None
    """Cost of the one-shot pruning before the first step; None without any, or if it needs no data."""
    verdict: Verdict

    @property
    def num_examples(self) -> int | None:
        """Examples to train on; None without data."""
        return self.data.num_examples

    @property
    def start(self) -> dict[str, object] | None:
        """Settings of the one-shot pruning before the first step, with "sparsity" and "folder"; None without."""
        start = self.run.start
        if start.method == "none":
            return None
        return {**asdict(start), "sparsity": self.run.start_sparsity, "folder": self.run.started().model.path}

    @property
    def base_grid(self) -> str | None:
        """Quantisation scheme of the pruned layers' frozen weights; None if they stay unquantised."""
        grid = frozen_grid(self.run, self.run.model.base_bits)
        return str(grid) if grid else None

    @property
    def embedding_grid(self) -> str | None:
        """Quantisation scheme of the frozen embedding and output layer; None if they stay unquantised."""
        grid = frozen_grid(self.run, self.run.model.embedding_bits)
        return str(grid) if grid else None

    @property
    def placement(self) -> str:
        """``model.base_placement`` without "auto"."""
        return {0: "sharded", 1: "replicated"}.get(self.copy_ranks, "node")

    @property
    def share_of_masks(self) -> float:
        """Share of the training time that mask updates take."""
        mask_updates = 0
        if self.schedule is not None:
            mask_updates = self.schedule.mask_updates
        return self.time.share_of_masks(self.num_steps, mask_updates)

    def as_json(self) -> dict[str, object]:
        """Return the plan as JSON values."""
        fields = asdict(self)
        del fields["memory"], fields["run"], fields["data"]
        if self.finetuning is not None:
            fields["finetuning"] = self.finetuning.as_json()
        run = self.run
        memory = self.memory
        memory_bytes: dict[str, int | None] = {**memory.as_dict()}
        if self.trace is None:
            memory_bytes["activations"] = None  # unknown, not 0
        return fields | {
            "num_examples": self.num_examples,
            "precision": run.train.precision,
            "sequence_parallel": run.train.sequence_parallel,
            "sequence": run.data.max_length,
            "activation_checkpointing": run.model.gradient_checkpointing,
            "start": self.start,
            "base_grid": self.base_grid,
            "embedding_grid": self.embedding_grid,
            "memory_bytes_per_rank": memory_bytes,
            "optimizer_bytes_per_rank": memory.optimizer or memory.host,
            "weight_bytes_per_rank": memory.weights + memory.masks,
            "time": fields["time"] | {"over_full": self.time.over_full, "share_of_masks": self.share_of_masks},
        }


def plan(run: RunConfig | str | Path | ResolvedRun, options: PlanOptions | None = None) -> Plan:
    """Plan a run: resolved, as a config, or as the path of its run file or run folder. Raises InputError."""
    options = options or PlanOptions()
    if isinstance(run, ResolvedRun):
        resolved = run
    else:
        config = run if isinstance(run, RunConfig) else load_run_or_folder(run)
        resolved = resolve_to_plan(config, options)
    return plan_resolved(resolved, options, count_examples(resolved, options))


def resolve_to_plan(run: RunConfig, options: PlanOptions) -> ResolvedRun:
    """Return the resolved run, after the checks that need no data. Raises InputError."""
    ranks = _num_ranks(options)
    require_engine(run, ranks)
    run.micro_batch_size(ranks)  # raises before the data is read
    if options.no_data and not run.train.num_steps:
        raise InputError(
            f"train.num_steps = {run.train.num_steps}: no_data = true cannot count the steps of an epoch. "
            "Set train.num_steps = 1000 and train.num_epochs = 0."
        )
    return resolve(run, reads_data=not options.no_data)


def count_examples(resolved: ResolvedRun, options: PlanOptions) -> PlannedData:
    """Read the examples to train on, and count them. Raises InputError."""
    if options.no_data:
        return PlannedData(num_examples=None, remark="")
    examples = resolved.load("train")
    return PlannedData(num_examples=len(examples), remark=resolved.task.remark(resolved.run.data, examples))


def plan_resolved(resolved: ResolvedRun, options: PlanOptions, data: PlannedData) -> Plan:
    """Plan a resolved run, whose examples are counted already. Raises InputError for what ``pst-ds train`` rejects."""
    run = resolved.run
    ranks = _num_ranks(options)
    require_engine(run, ranks)
    # without DeepSpeed, a single process trains
    raw = None
    stage = None
    if run.deepspeed_config:
        raw = load_deepspeed_config(run.deepspeed_config)
        stage = zero_stage(raw)
    micro_batch_size = run.micro_batch_size(ranks)
    # masks are padded so that every rank has as many bytes; the other stages do not shard them
    resolved = resolved.with_shards(ranks if stage == 3 else 1)
    require_trainable(resolved, ranks=ranks, stage=stage or 0, reads_teacher=not options.no_data)
    model = resolved.shapes.model
    num_steps = run.train.num_steps
    if data.num_examples is not None:
        num_steps = require_stages(run, data.num_examples)
    machine_name = options.machine or _machine_name(ranks)
    machine = machine_of(machine_name)
    optimizer_groups = parameter_groups(model, run)
    # as pst_ds.train.run.build has it: engines of DeepSpeed see flat factors
    flats: list[int] = []
    if raw is not None:
        flats = flat_sizes(model, optimizer_groups)
    numbers = model_numbers(model, device=machine.device, flats=flats)
    zero = _zero(run, raw, model, ranks, machine, options.memory)
    layers = _layers(resolved.shapes)
    embeddings = _embeddings(model)
    trained_in_full = head_names(model, run)
    remarks = []
    if data.remark:
        remarks.append(data.remark)
    groups = [sum(p.numel() for p in group["params"]) for group in optimizer_groups]
    start = start_cost(run, model, numbers, ranks, machine)
    finetuning = run.finetuning()
    before: Plan | None = None
    if finetuning is not None:
        # it trains other parameters, so its micro-batch has another trace
        before = plan_resolved(resolved.with_settings(finetuning), replace(options, trace=None), data)
    # tracing changes the model, and the shapes are shared with other plans of this run
    trace = options.trace or _trace(copy.deepcopy(model), run, ranks, zero.persistence_threshold, machine.device, flats)
    num_blocks = len(blocks_of(model))
    recomputed = _recomputed_share(run, num_blocks)
    scale_bytes = numbers.bytes_of("scales")
    checkpoint_bytes = most_bytes(numbers.trainables, numbers.pruned_weights, scale_bytes // SCALE_BYTES)
    memory, times, judged = _cost(
        run=run,
        numbers=numbers,
        zero=zero,
        groups=groups,
        start=start,
        before=before,
        trace=trace,
        machine=machine,
        num_steps=num_steps,
        recomputed=recomputed,
        extra_tokens=extra_tokens_of(model),
        checkpoint_bytes=checkpoint_bytes,
        options=options,
    )
    return Plan(
        run=run,
        ranks=ranks,
        zero_stage=stage,
        micro_batch_size=micro_batch_size,
        num_steps=num_steps,
        data=data,
        unit=task_of(run).unit,
        machine=machine_name,
        copy_ranks=zero.copy_ranks,
        num_blocks=num_blocks,
        trained_in_full=trained_in_full,
        layers=layers,
        updated_embeddings=embeddings,
        parameters=numbers.parameters,
        trained_parameters=numbers.trainables,
        pruned_parameters=numbers.pruned_weights,
        schedule=_schedule(run, num_steps),
        rounding=_rounding(run, num_steps),
        remarks=remarks,
        memory=memory,
        trace=trace,
        mask_bytes=numbers.bytes_of("mask"),
        scale_bytes=scale_bytes,
        checkpoint_bytes=checkpoint_bytes,
        time=times,
        finetuning=before,
        start_cost=start,
        verdict=judged,
    )


def _zero(
    run: RunConfig, raw: JsonObject | None, model: nn.Module, ranks: int, machine: Machine, memory: int
) -> ZeroSettings:
    """Return the settings of DeepSpeed on ``machine``, with the place of frozen weights. Raises InputError."""
    resolved = resolved_deepspeed_config(run, raw, model, ranks=ranks)
    copies = 0
    if resolved is not None:
        copies = place_frozen(
            resolved,
            run.model.base_placement,
            frozen_bytes(model, run, ranks),
            ranks,
            machine.node_size,
            memory or machine.capacity,
            names=(run.deepspeed_config, "the run file"),
        )
    zero = zero_settings(resolved, ranks, machine.backend)
    return replace(zero, node_size=machine.node_size, copy_ranks=copies)


def _cost(
    *,
    run: RunConfig,
    numbers: ModelNumbers,
    zero: ZeroSettings,
    groups: list[int],
    start: Cost | None,
    before: Plan | None,
    trace: Trace | None,
    machine: Machine,
    num_steps: int,
    recomputed: float,
    extra_tokens: int,
    checkpoint_bytes: int,
    options: PlanOptions,
) -> tuple[MemoryPlan, TimePlan, Verdict]:
    """Predict memory and time.

    ``groups``: trained parameters of each optimizer group; ``before``: the fine-tuning; ``recomputed``: share of the
    blocks that recompute their activations; ``extra_tokens``: positions that additions take in every sequence.
    """
    teacher_bytes, teacher_weights = _teacher(run, numbers, options.no_data)
    # every expert is read from the files, on whichever rank it is then
    model_bytes = numbers.whole_bytes
    numbers = numbers.divided(run.train.experts_divided_by(zero.world_size))
    ranks = zero.world_size
    accumulation = run.train.gradient_accumulation_steps
    # a model that cannot be traced has no activations in its plan, which says so
    batch = _batch(run, ranks, teacher_weights, trace or Trace(), recomputed=recomputed, extra_tokens=extra_tokens)
    memory = memory_plan(
        numbers,
        zero,
        activations=batch.trace.activations,
        element_size=DTYPES[run.train.precision].itemsize,
        device=machine.device,
        trainable_groups=groups,
        teacher=teacher_bytes,
        solves=run.schedule.solves > 0,
    )
    schedule = run.make_schedules(num_steps).masks
    times = time_plan(numbers, zero, batch, machine)
    peak = memory.peak
    seconds_before = 0.0  # of the stages before the first step
    if start is not None:
        # the start has freed its memory before training allocates any
        peak = max(peak, int(start.memory["peak"]))
        seconds_before += start.time["all"]
    kept = round((1.0 - recomputed) * memory.activations)
    # a save before the last step is written from a copy; the last one is written from the engine's own memory
    copies = 0 < run.checkpoint.interval < num_steps or run.eval.interval > 0
    need = need_of_rank(machine.device, peak, kept, copies * checkpoint_bytes / ranks)
    if before is not None:
        judged = before.verdict
        seconds_before += 3600 * judged.hours
        # the stages run one after another, in the same memory
        need = Need(max(need.enough, judged.needed_bytes), max(need.least, judged.least_bytes))
    mask_updates = 0
    if schedule is not None:
        mask_updates = sum(schedule.updates_masks_at(step) for step in range(num_steps + 1))
    work = Work(
        ranks=ranks,
        steps=num_steps,
        mask_updates=mask_updates,
        tokens=run.train.batch_size * run.data.max_length,
        # model FLOPs utilisation does not count recomputation
        flops=accumulation * step_flops(numbers, replace(batch, recomputed=0.0)),
        start_seconds=seconds_before,
        need=need,
        model_bytes=model_bytes,
        checkpoint_bytes=checkpoint_bytes,
        least_batch=run.train.groups_of_ranks(ranks) * accumulation,
    )
    return memory, times, verdict(work, times, machine, memory=options.memory)


def _machine_name(ranks: int) -> str:
    """Return the machine to plan for if none is named: this one only if it has a core for every rank."""
    # with more ranks than cores, this host is where the run is planned, not where it trains
    if not torch.accelerator.is_available() and ranks <= (os.cpu_count() or 1):
        return "cpu"
    return "h100"


def _num_ranks(options: PlanOptions) -> int:
    """Return the number of ranks to plan for. Raises InputError for less than one."""
    ranks = options.ranks or launch_environment().world_size
    if ranks < 1:
        raise InputError(f"ranks = {ranks}: a run has at least one rank. Set ranks = 1 or more.")
    return ranks


def _layers(shapes: RunShapes) -> list[PlannedLayer]:
    layers = pst_layers(shapes.model)
    planned = []
    for target in shapes.targets:
        layer = PlannedLayer(
            name=target.name,
            out_features=target.layout.out_features,
            in_features=target.layout.in_features,
            matrices=target.layout.num_matrices,
            experts=target.layout.num_experts,
            factor_parameters=sum(p.numel() for _, p in layers[target.name].factor_parameters()),
        )
        planned.append(layer)
    return planned


def _embeddings(model: nn.Module) -> list[PlannedEmbedding]:
    return [
        PlannedEmbedding(name, e.num_embeddings, e.embedding_dim, e.num_factor_parameters)
        for name, e in pst_embeddings(model).items()
    ]


def start_cost(run: RunConfig, model: nn.Module, numbers: ModelNumbers, ranks: int, machine: Machine) -> Cost | None:
    """Predict the one-shot pruning before the run; None without any, or if it needs no data. Raises InputError."""
    if run.start.method == "none":
        return None
    config = one_shot_config(run, run.start.samples)
    if not config.needs_data:
        return None
    size = DTYPES[run.train.precision].itemsize
    place = Pretrained(run.model.path, "model.path")
    dtype = getattr(place.config(), "dtype", None)
    # a config without a dtype: the files are assumed to have the run's
    stored_size = size
    if isinstance(dtype, torch.dtype):
        stored_size = dtype.itemsize
    data = StartData(
        config=config, ranks=ranks, length=run.data.max_length, batch=run.eval_batch_size, itemsizes=(stored_size, size)
    )
    if config.method == CHANNELS:
        return cut_plan(run, data, machine)
    return start_plan(block_sizes(model, numbers), data, machine)


def _teacher(run: RunConfig, numbers: ModelNumbers, no_data: bool) -> tuple[int, int]:
    """Return the bytes that every rank holds for the run's teacher, and the weights that it multiplies with.

    A model that is its own teacher needs no bytes. With ``no_data`` a separate teacher is assumed to be as large as the
    model.
    """
    if not run.distillation.weight:
        return 0, 0
    if not no_data:
        shapes = teacher_shapes(run)
        if shapes is not None:
            numbers = model_numbers(shapes)
    multiplied = int(numbers.multiplied_weights) + numbers.dense_weights
    if not run.distillation.teacher:
        return 0, multiplied
    itemsize = DTYPES[run.train.precision].itemsize
    nbytes = 0
    for tensor in numbers.tensors:
        if tensor.kind != "weight":
            continue
        # a teacher is dense: where the model stores something in place of a weight, the teacher has the weight
        if tensor.stands_for is None:
            nbytes += tensor.nbytes
        else:
            nbytes += tensor.parameters * itemsize
    return nbytes, multiplied


def _trace(model: nn.Module, run: RunConfig, ranks: int, threshold: int, device: str, flats: list[int]) -> Trace | None:
    """Trace a micro-batch; return None for a model whose forward pass needs values."""
    micro_batch_size = run.micro_batch_size(ranks)
    try:
        trace = trace_micro_batch(
            model,
            batch=micro_batch_size,
            sequence=run.data.max_length // run.train.sequence_parallel,
            checkpointing=run.model.gradient_checkpointing,
            recomputed_blocks=run.model.recomputed_blocks,
            persistence_threshold=threshold,
            distilled=run.distillation.weight > 0.0 and run.task_facts.predicts_tokens,
            device=device,
            flats=flats,
        )
    except UntraceableError:
        return None
    keeps_apart = run.task_facts.packs_text and run.data.keeps_documents_apart
    attention = getattr(model.config, "_attn_implementation", "")
    if run.train.sequence_parallel > 1 and keeps_apart and attention == "sdpa" and not is_long(run.data.max_length):
        trace.activations += micro_batch_size * run.data.max_length**2  # the mask of whole sequences, bool
    return trace


def _recomputed_share(run: RunConfig, num_blocks: int) -> float:
    """Return the share of the ``num_blocks`` blocks of a model that recompute their activations."""
    if not run.model.gradient_checkpointing:
        return 0.0
    if run.model.recomputed_blocks is None or num_blocks == 0:
        return 1.0
    return run.model.recomputed_blocks / num_blocks


def _batch(
    run: RunConfig, ranks: int, teacher_weights: int, trace: Trace, *, recomputed: float, extra_tokens: int
) -> Batch:
    sequence = run.data.max_length + extra_tokens
    return Batch(
        tokens=run.micro_batch_size(ranks) * sequence // run.train.sequence_parallel,
        sequence=sequence,
        shared_by=run.train.sequence_parallel,
        element_size=DTYPES[run.train.precision].itemsize,
        micro_batches=run.train.gradient_accumulation_steps,
        recomputed=recomputed,
        teacher_weights=teacher_weights,
        own_teacher=run.distillation.weight > 0 and not run.distillation.teacher,
        trace=trace,
    )


def _schedule(run: RunConfig, num_steps: int) -> PlannedSchedule | None:
    schedule = run.make_schedules(num_steps).masks
    if schedule is None:
        return None
    updates = [step for step in range(num_steps + 1) if schedule.updates_masks_at(step)]
    eighths = sorted({round(num_steps * i / 8) for i in range(9)})
    return PlannedSchedule(
        final_sparsity=schedule.sparsity_at(num_steps),
        mask_updates=len(updates),
        first_update=updates[0] if updates else None,
        last_update=updates[-1] if updates else None,
        sparsity_at={step: round(schedule.sparsity_at(step), 6) for step in eighths},
    )


def _rounding(run: RunConfig, num_steps: int) -> PlannedRounding | None:
    schedule = run.make_schedules(num_steps).rounding
    if schedule is None:
        return None
    searches = sum(schedule.updates_scales_at(step) for step in range(num_steps + 1))
    return PlannedRounding(str(grid_of_run(run)), schedule.start, searches)
