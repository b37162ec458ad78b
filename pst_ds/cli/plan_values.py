"""A plan as JSON values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from pst_ds.checkpoint.format import SCALE_BYTES, most_bytes
from pst_ds.cli.init.start import remark_on_dense_start
from pst_ds.cli.plan_text import Plan
from pst_ds.config.run import RunConfig
from pst_ds.config.sequences import groups_of_ranks
from pst_ds.config.start import started
from pst_ds.data.tasks import task_of
from pst_ds.errors import InputError
from pst_ds.json_text import JsonObject
from pst_ds.masks.layer_stats import chosen_layers
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.tables.embedding import pst_embeddings
from pst_ds.parallel.ds_config import RunNumbers, load_deepspeed_config, resolve_deepspeed_config, zero_stage
from pst_ds.parallel.launch import launch_environment
from pst_ds.planning.activations import Trace, UntraceableError, trace_micro_batch
from pst_ds.planning.machine_file import machine_of
from pst_ds.planning.machines import Machine
from pst_ds.planning.memory import ModelNumbers, memory_plan
from pst_ds.planning.process_memory import Need, need_of_process
from pst_ds.planning.shapes import model_numbers
from pst_ds.planning.time import Batch, step_flops, time_plan
from pst_ds.planning.verdict import Work, verdict
from pst_ds.planning.zero_settings import ZeroSettings, zero_settings
from pst_ds.train.model import (
    base_grid_of_run,
    embedding_grid_of_run,
    grid_of_run,
    head_names,
    load_tokenizer,
    meta_model,
    num_trainable,
    parameter_groups,
    require_precision,
)
from pst_ds.train.monitor.dense_run import read_dense_run
from pst_ds.train.objective import require_teacher, teacher_shapes
from pst_ds.train.sequences.shared import require_shareable


@dataclass(frozen=True, slots=True)
class Ask:
    """What a plan is asked for, beside the run."""

    ranks: int | None = None
    machine: str | None = None
    no_data: bool = False
    memory: int = 0
    """As of :func:`pst_ds.planning.verdict.verdict`, like ``price``."""
    price: float | None = None
    trace: Trace | None = None
    """Of the same micro-batch, on any number of ranks; None to make one."""
    zero: Mapping[str, object] = field(default_factory=dict)
    """Laid over ``zero_optimization`` of the DeepSpeed settings."""


def make_plan(config: RunConfig, ask: Ask) -> Plan:
    """Return the plan of a run as JSON values. Raises InputError."""
    ranks, raw = _ranks_and_deepspeed(config, ask)
    no_data = ask.no_data
    micro_batch_size = config.micro_batch_size(ranks)
    stage = zero_stage(raw) if raw is not None else None
    tokenizer, labels, unit, num_examples, about_data = _data(config, no_data)
    model = meta_model(config, labels, tokenizer, num_shards=ranks if stage == 3 else 1)
    require_precision(config, model)
    require_shareable(config, model.config, stage or 0, micro_batch_size)
    chosen_layers(list(pst_layers(model)), config.pictures.layers)  # refuse layers that are not there, as train does
    if not no_data:
        require_teacher(config, model)
        read_dense_run(config)
    num_steps = config.num_steps(num_examples) if num_examples is not None else config.train.num_steps
    has_cores = not torch.accelerator.is_available() and ranks <= (os.cpu_count() or 1)
    machine = ask.machine or ("cpu" if has_cores else "h100")
    rates = machine_of(machine)
    zero = _zero_settings(config, raw, ranks, micro_batch_size, num_trainable(model), rates)
    device = rates.device
    numbers = model_numbers(model, device=device)
    schedule, teacher = _schedule(config, num_steps), _teacher(config, numbers, no_data)
    plan: Plan = {
        "ranks": ranks,
        "zero_stage": stage,
        "precision": config.train.precision,
        "micro_batch_size": micro_batch_size,
        "sequence_parallel": config.train.sequence_parallel,
        "num_steps": num_steps,
        "num_examples": num_examples,
        "unit": unit,
        "sequence": config.data.max_length,
        "activation_checkpointing": config.model.gradient_checkpointing,
        "machine": machine,
        "trained_in_full": head_names(model, config),
        **_layers(model),
        "parameters": numbers.parameters,
        "trained_parameters": numbers.trainables,
        "pruned_parameters": numbers.pruned_weights,
        "start": _start(config),
        "schedule": schedule,
        "rounding": _rounding(config, num_steps),
        "base_grid": str(base_grid) if (base_grid := base_grid_of_run(config)) else None,
        "embedding_grid": str(table_grid) if (table_grid := embedding_grid_of_run(config)) else None,
        "remarks": [remark for remark in (about_data, remark_on_dense_start(config, model)) if remark],
    }
    groups = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, config)]
    trace = ask.trace or _trace(model, config, micro_batch_size, zero.persistence_threshold, device)  # uses it up
    plan |= _memory(config, numbers, zero, teacher["bytes"], groups, trace, device)
    plan["trace"] = asdict(trace) if trace else None
    plan["mask_bytes"] = sum(t.numel * t.count for t in numbers.tensors if t.is_mask)
    plan["scale_bytes"] = sum(t.numel * t.count for t in numbers.tensors if t.is_scales)
    num_scales = plan["scale_bytes"] // SCALE_BYTES
    plan["checkpoint_bytes"] = most_bytes(numbers.trainables, numbers.pruned_weights, num_scales)
    batch = _batch(config, micro_batch_size, teacher, trace)
    times = time_plan(numbers, zero, batch, rates)
    share = times.share_of_masks(num_steps, schedule["mask_updates"] if schedule else 0)
    work = _work(config, plan, numbers, batch, _need(config, plan, device))
    judged = asdict(verdict(work, times, rates, memory=ask.memory, price=ask.price))
    return {**plan, "time": {**asdict(times), "over_full": times.over_full, "share_of_masks": share}, "verdict": judged}


def _need(config: RunConfig, plan: Plan, device: str) -> Need:
    """Return what a rank must have: on a GPU its peak, on a CPU the process and copies to save beside it."""
    memory = plan["memory_bytes_per_rank"]
    if device != "cpu":
        return Need(memory["peak"], memory["peak"])
    kept = 0 if plan["activation_checkpointing"] else memory["activations"] or 0
    # A save from before the last step is written from a copy; the last one is written from the engine's own memory.
    copies = 0 < config.checkpoint.interval < plan["num_steps"] or config.eval.interval > 0
    return need_of_process(memory["peak"], kept, copies * plan["checkpoint_bytes"] / plan["ranks"])


def _start(config: RunConfig) -> dict[str, object] | None:
    """The one-shot pruning that the run begins with; None for none."""
    if config.start.method == "none":
        return None
    return {**asdict(config.start), "sparsity": config.start.sparsity(config), "folder": started(config).model.path}


def _work(config: RunConfig, plan: Plan, numbers: ModelNumbers, batch: Batch, need: Need) -> Work:
    steps, schedule = config.train.gradient_accumulation_steps, plan["schedule"]
    return Work(
        ranks=plan["ranks"],
        steps=plan["num_steps"],
        mask_updates=schedule["mask_updates"] if schedule else 0,
        tokens=config.train.batch_size * config.data.max_length,
        flops=steps * step_flops(numbers, replace(batch, checkpointing=False)),
        need=need,
        model_bytes=numbers.whole_bytes,
        checkpoint_bytes=plan["checkpoint_bytes"],
        least_batch=groups_of_ranks(config.train.sequence_parallel, plan["ranks"]) * steps,
    )


def _ranks_and_deepspeed(config: RunConfig, ask: Ask) -> tuple[int, JsonObject | None]:
    """Return how many ranks to plan for, and the DeepSpeed settings as in the file; None for one process without."""
    ranks = ask.ranks or launch_environment().world_size
    if config.deepspeed_config:
        raw = load_deepspeed_config(config.deepspeed_config)
        section: Any = raw.get("zero_optimization") or {}
        return ranks, {**raw, "zero_optimization": {**section, **ask.zero}} if ask.zero else raw
    if ranks > 1:
        raise InputError(
            f"{ranks} ranks, but deepspeed_config is not set; set deepspeed_config = "
            '"ds_configs/zero3.json", or plan for one process'
        )
    return ranks, None


def _data(config: RunConfig, no_data: bool) -> tuple[Any, list[str], str, int | None, str]:
    """Return (tokenizer, labels, unit of the examples, their number, a remark on them); nothing is read with
    ``no_data``."""
    task = task_of(config)
    if no_data:
        if not config.train.num_steps:
            raise InputError(
                f"--no-data, and train.num_steps = {config.train.num_steps}: the number of steps follows from the data "
                "then; set it with --set train.num_steps=1000 --set train.num_epochs=0"
            )
        return None, ["0", "1"] if task.new_head else [], task.unit, None, ""
    tokenizer, labels = load_tokenizer(config), task.label_names(config.data)
    examples = task.load(config.data, "train", tokenizer, labels)
    return tokenizer, labels, task.unit, len(examples), task.remark(config.data, examples)


def _zero_settings(
    config: RunConfig, raw: JsonObject | None, ranks: int, micro_batch_size: int, trainables: int, machine: Machine
) -> ZeroSettings:
    train, resolved = config.train, None
    if raw is not None:
        steps, clipping, is_bf16 = train.gradient_accumulation_steps, train.gradient_clipping, train.precision == "bf16"
        own = RunNumbers(micro_batch_size * steps * ranks, micro_batch_size, steps, clipping, is_bf16, trainables)
        resolved = resolve_deepspeed_config(raw, own, source=config.deepspeed_config, run_file="the run file")
    return zero_settings(resolved, ranks, machine.backend)


def _layers(model: torch.nn.Module) -> Plan:
    layers = [
        {
            "name": name,
            "out_features": layer.layout.out_features,
            "in_features": layer.layout.in_features,
            "matrices": layer.layout.num_matrices,
            "experts": layer.layout.num_experts,
            "factor_parameters": sum(p.numel() for _, p in layer.factor_parameters()),
        }
        for name, layer in pst_layers(model).items()
    ]
    embeddings = [
        {"name": name, "rows": e.num_embeddings, "width": e.embedding_dim, "factor_parameters": e.num_factor_parameters}
        for name, e in pst_embeddings(model).items()
    ]
    return {"layers": layers, "updated_embeddings": embeddings}


def _memory(
    config: RunConfig, numbers: ModelNumbers, zero: ZeroSettings, teacher: int, groups: list[int], trace: Trace | None,
    device: str,
) -> Plan:  # fmt: skip
    activations, element_size = trace.activations if trace else 0, DTYPES[config.train.precision].itemsize
    sizes = {"activations": activations, "element_size": element_size, "teacher": teacher}
    memory = memory_plan(numbers, zero, device=device, trainable_groups=groups, **sizes)
    return {
        "memory_bytes_per_rank": {**memory.as_dict(), "activations": memory.activations if trace else None},
        "optimizer_bytes_per_rank": memory.optimizer or memory.host,
        "weight_bytes_per_rank": memory.weights + memory.masks,
    }


def _teacher(config: RunConfig, numbers: ModelNumbers, no_data: bool) -> dict[str, int]:
    """Return ``bytes`` that every rank holds for a teacher, ``weights`` it multiplies with, and if it is the ``own``.

    One in a folder is not looked for with ``no_data``, and taken to be of the model's size.
    """
    if not config.distillation.weight:
        return {"bytes": 0, "weights": 0, "own": False}
    shapes = None if no_data else teacher_shapes(config)
    own, numbers = not config.distillation.teacher, numbers if shapes is None else model_numbers(shapes)
    kept = [t for t in numbers.tensors if not (t.is_mask or t.is_scales or t.is_factor)]
    itemsize = DTYPES[config.train.precision].itemsize
    nbytes = sum(t.numel * t.element_size * t.count for t in kept if t.stands_for is None)
    nbytes += sum(t.stands_for * itemsize * t.count for t in kept if t.stands_for is not None)
    nbytes = 0 if own else nbytes
    return {"bytes": nbytes, "weights": int(numbers.multiplied_weights) + numbers.dense_weights, "own": own}


def _trace(model: Any, config: RunConfig, micro_batch_size: int, threshold: int, device: str) -> Trace | None:
    """Trace a micro-batch; None for a model whose forward pass cannot do without values."""
    try:
        trace = trace_micro_batch(
            model,
            batch=micro_batch_size,
            sequence=config.data.max_length // config.train.sequence_parallel,
            checkpointing=config.model.gradient_checkpointing,
            persistence_threshold=threshold,
            distilled=config.distillation.weight > 0.0 and config.task_facts.predicts_tokens,
            device=device,
        )
    except UntraceableError:
        return None
    keeps_apart = config.task_facts.packs_text and config.data.keeps_documents_apart
    if config.train.sequence_parallel > 1 and keeps_apart and model.config._attn_implementation == "sdpa":
        trace.activations += micro_batch_size * config.data.max_length**2  # the mask of whole sequences
    return trace


def _batch(config: RunConfig, micro_batch_size: int, teacher: dict[str, int], trace: Trace | None) -> Batch:
    return Batch(
        tokens=micro_batch_size * config.data.max_length // config.train.sequence_parallel,
        sequence=config.data.max_length,
        shared_by=config.train.sequence_parallel,
        micro_batches=config.train.gradient_accumulation_steps,
        checkpointing=config.model.gradient_checkpointing,
        teacher_weights=teacher["weights"],
        own_teacher=bool(teacher["own"]),
        gathered=trace.gathered if trace else 0,
        gathers=trace.gathers if trace else 0,
        moved=trace.moved if trace else 0,
        launches=trace.launches if trace else 0,
    )


def _schedule(config: RunConfig, num_steps: int) -> Plan | None:
    schedule = config.make_schedules(num_steps).masks
    if schedule is None:
        return None
    updates = [step for step in range(num_steps + 1) if schedule.updates_masks_at(step)]
    eighths = sorted({round(num_steps * i / 8) for i in range(9)})
    return {
        "final_sparsity": schedule.sparsity_at(num_steps),
        "mask_updates": len(updates),
        "first_update": updates[0] if updates else None,
        "last_update": updates[-1] if updates else None,
        "sparsity_at": {step: round(schedule.sparsity_at(step), 6) for step in eighths},
    }


def _rounding(config: RunConfig, num_steps: int) -> Plan | None:
    schedule = config.make_schedules(num_steps).rounding
    if schedule is None:
        return None
    searches = sum(schedule.updates_scales_at(step) for step in range(num_steps + 1))
    return {
        "grid": str(grid_of_run(config)),
        "activation_bits": config.quantization.activation_bits,
        "start": schedule.start,
        "searches": searches,
    }
