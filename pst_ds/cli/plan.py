"""``pst-ds plan RUN.toml``: what a run would do, from names and shapes alone."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import Any

from pst_ds.cli.main import add_run_arguments, count, load_run_or_folder
from pst_ds.planning.machines import MACHINES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "run file (TOML)")
    parser.add_argument(
        "--world-size", "--ranks", dest="ranks", type=count, metavar="N",
        help="ranks to plan for; needs no cluster (default: the launcher's, or 1)",
    )  # fmt: skip
    parser.add_argument(
        "--no-data", action="store_true",
        help="read neither data nor tokenizer: model.path may hold a config.json alone; needs train.num_steps",
    )  # fmt: skip
    parser.add_argument(
        "--machine", choices=tuple(MACHINES),
        help="rates for the expected times (default: cpu where there is no GPU and a core for every rank, else h100)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = load_run_or_folder(args)
    from pst_ds.cli.plan_text import print_plan

    plan = make_plan(config, args.ranks, args.machine, no_data=args.no_data)
    print_plan(plan)
    return plan


def make_plan(
    config: Any, ranks: int | None, machine: str | None, *, no_data: bool, trace: Any = None
) -> dict[str, Any]:
    """Return the plan of a run as JSON values; ``trace``: a Trace of the same micro-batch, on any number of ranks."""
    from pst_ds.checkpoint.format import most_bytes
    from pst_ds.masks.layer_stats import chosen_layers
    from pst_ds.nn.inject import pst_layers
    from pst_ds.parallel.ds_config import zero_stage
    from pst_ds.planning.shapes import model_numbers
    from pst_ds.train.model import head_names, meta_model, num_trainable, parameter_groups
    from pst_ds.train.objective import require_teacher

    ranks, raw = _ranks_and_deepspeed(config, ranks)
    micro_batch_size = config.micro_batch_size(ranks)
    stage = zero_stage(raw) if raw is not None else None
    tokenizer, labels, unit, num_examples = _data(config, no_data)
    model = meta_model(config, labels, tokenizer, num_shards=ranks if stage == 3 else 1)
    chosen_layers(list(pst_layers(model)), config.pictures.layers)  # as train would: refuses what is not there
    if not no_data:
        require_teacher(config, model)
    num_steps = config.num_steps(num_examples) if num_examples is not None else config.train.num_steps
    machine = machine or _machine_here(ranks)
    zero = _zero_settings(config, raw, ranks, micro_batch_size, num_trainable(model), machine)
    device = "cpu" if machine == "cpu" else "cuda"
    numbers = model_numbers(model, device=device)
    plan: dict[str, Any] = {
        "ranks": ranks,
        "zero_stage": stage,
        "precision": config.train.precision,
        "micro_batch_size": micro_batch_size,
        "num_steps": num_steps,
        "num_examples": num_examples,
        "unit": unit,
        "sequence": config.data.max_length,
        "activation_checkpointing": config.model.gradient_checkpointing,
        "machine": machine,
        "trained_in_full": head_names(model, config),
        "layers": _layers(model),
        "updated_embeddings": _embeddings(model),
        "parameters": numbers.parameters,
        "trained_parameters": numbers.trainables,
        "pruned_parameters": numbers.pruned_weights,
        "schedule": _schedule(config, num_steps),
    }
    teacher = _teacher(config, numbers, no_data)
    groups = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, config)]
    trace = trace or _trace(model, config, micro_batch_size, zero.persistence_threshold)  # uses the model up
    plan |= _memory(config, numbers, zero, teacher, groups, trace, device)
    plan["trace"] = asdict(trace) if trace else None
    plan["checkpoint_bytes"] = most_bytes(numbers.trainables, numbers.pruned_weights)
    plan["mask_bytes"] = sum(t.numel * t.count for t in numbers.tensors if t.is_mask)
    plan["time"] = _times(config, numbers, zero, teacher, trace, micro_batch_size, machine, plan["schedule"], num_steps)
    return plan


def _ranks_and_deepspeed(config: Any, wanted: int | None) -> tuple[int, dict[str, Any] | None]:
    """How many ranks to plan for, and the DeepSpeed settings as they are in the file; none for one process without."""
    from pst_ds.errors import InputError
    from pst_ds.parallel.ds_config import load_deepspeed_config
    from pst_ds.parallel.launch import launch_environment

    ranks = wanted or launch_environment().world_size
    if config.deepspeed_config:
        return ranks, load_deepspeed_config(config.deepspeed_config)
    if ranks > 1:
        raise InputError(
            f"{ranks} ranks, but deepspeed_config is not set; set deepspeed_config = "
            '"ds_configs/zero3.json", or plan for one process'
        )
    return ranks, None


def _data(config: Any, no_data: bool) -> tuple[Any, list[str], str, int | None]:
    """(tokenizer, labels, what an example is called, how many there are); nothing is read with ``no_data``."""
    from pst_ds.data.tasks import task_of
    from pst_ds.errors import InputError
    from pst_ds.train.model import load_tokenizer

    task = task_of(config)
    if no_data:
        if not config.train.num_steps:
            raise InputError(
                f"--no-data, and train.num_steps = {config.train.num_steps}: the number of steps follows from the data "
                "then; set it with --set train.num_steps=1000"
            )
        return None, ["0", "1"] if task.new_head else [], task.unit, None
    tokenizer = load_tokenizer(config)
    labels = task.label_names(config.data)
    return tokenizer, labels, task.unit, len(task.load(config.data, "train", tokenizer, labels))


def _machine_here(ranks: int) -> str:
    import torch

    return "cpu" if not torch.accelerator.is_available() and ranks <= (os.cpu_count() or 1) else "h100"


def _zero_settings(
    config: Any, raw: dict[str, Any] | None, ranks: int, micro_batch_size: int, trainables: int, machine: str
) -> Any:
    from pst_ds.parallel.ds_config import RunNumbers, resolve_deepspeed_config
    from pst_ds.planning.zero_settings import zero_settings

    train, resolved = config.train, None
    if raw is not None:
        own = RunNumbers(
            train.batch_size, micro_batch_size, train.gradient_accumulation_steps, train.gradient_clipping,
            train.precision == "bf16", trainables,
        )  # fmt: skip
        resolved = resolve_deepspeed_config(raw, own, source=config.deepspeed_config, run_file="the run file")
    return zero_settings(resolved, ranks, "gloo" if machine == "cpu" else "nccl")


def _layers(model: Any) -> list[dict[str, Any]]:
    from pst_ds.nn.inject import pst_layers

    return [
        {
            "name": name,
            "out_features": layer.layout.out_features,
            "in_features": layer.layout.in_features,
            "matrices": layer.layout.parts,
            "factor_parameters": sum(p.numel() for _, p in layer.factor_parameters()),
        }
        for name, layer in pst_layers(model).items()
    ]


def _embeddings(model: Any) -> list[dict[str, Any]]:
    from pst_ds.nn.embedding import pst_embeddings

    return [
        {"name": name, "rows": e.num_embeddings, "width": e.embedding_dim, "factor_parameters": e.num_factor_parameters}
        for name, e in pst_embeddings(model).items()
    ]


def _memory(
    config: Any, numbers: Any, zero: Any, teacher: dict[str, Any], groups: list[int], trace: Any, device: str
) -> dict[str, Any]:
    from pst_ds.nn.base_model import DTYPES
    from pst_ds.planning.memory import memory_plan

    memory = memory_plan(
        numbers,
        zero,
        activations=trace.activations if trace else 0,
        element_size=DTYPES[config.train.precision].itemsize,
        device=device,
        trainable_groups=groups,
        teacher=teacher["bytes"],
    )
    return {
        "memory_bytes_per_rank": {**memory.as_dict(), "activations": memory.activations if trace else None},
        "optimizer_bytes_per_rank": memory.optimizer or memory.host,
        "weight_bytes_per_rank": memory.weights + memory.masks,
    }


def _teacher(config: Any, numbers: Any, no_data: bool) -> dict[str, Any]:
    """Of the run's distillation: ``bytes`` that every rank holds for it, ``weights`` it multiplies with, and whether it
    is the model's ``own``. One in a folder is not looked for with ``no_data``, and taken to be of the model's size."""
    from pst_ds.planning.shapes import model_numbers
    from pst_ds.train.objective import teacher_shapes

    if not config.distillation.weight:
        return {"bytes": 0, "weights": 0, "own": False}
    shapes = None if no_data else teacher_shapes(config)
    own, tensors = not config.distillation.teacher, numbers.tensors
    if shapes is not None:
        numbers = model_numbers(shapes)
        tensors = numbers.tensors
    kept = (t for t in tensors if not (t.is_mask or t.is_factor))
    nbytes = 0 if own else sum(t.numel * t.element_size * t.count for t in kept)
    return {"bytes": nbytes, "weights": numbers.pruned_weights + numbers.dense_weights, "own": own}


def _trace(model: Any, config: Any, micro_batch_size: int, threshold: int) -> Any:
    """A Trace, or None for a model whose forward pass cannot do without values."""
    from pst_ds.planning.activations import UntraceableError, trace_micro_batch

    try:
        trace = trace_micro_batch(
            model,
            batch=micro_batch_size,
            sequence=config.data.max_length,
            checkpointing=config.model.gradient_checkpointing,
            persistence_threshold=threshold,
        )
    except UntraceableError:
        return None
    if config.distillation.weight and config.task_facts.predicts_tokens:  # the teacher's logits, beside the model's own
        trace.activations += micro_batch_size * config.data.max_length * model.config.vocab_size * model.dtype.itemsize
    return trace


def _times(
    config: Any, numbers: Any, zero: Any, teacher: dict[str, Any], trace: Any, micro_batch_size: int, machine: str,
    schedule: Any, num_steps: int,
) -> dict[str, Any]:  # fmt: skip
    from pst_ds.planning.time import Batch, time_plan

    batch = Batch(
        tokens=micro_batch_size * config.data.max_length,
        sequence=config.data.max_length,
        micro_batches=config.train.gradient_accumulation_steps,
        checkpointing=config.model.gradient_checkpointing,
        teacher_weights=teacher["weights"],
        own_teacher=teacher["own"],
        gathered=trace.gathered if trace else 0,
        gathers=trace.gathers if trace else 0,
    )
    times = time_plan(numbers, zero, batch, MACHINES[machine])
    updates = schedule["mask_updates"] if schedule else 0
    return {**asdict(times), "share_of_masks": times.share_of_masks(num_steps, updates)}


def _schedule(config: Any, num_steps: int) -> dict[str, Any] | None:
    schedule = config.make_schedule(num_steps)
    if schedule is None:
        return None
    updates = [step for step in range(num_steps + 1) if schedule.updates_masks_at(step)]
    return {
        "final_sparsity": schedule.sparsity_at(num_steps),
        "mask_updates": len(updates),
        "first_update": updates[0] if updates else None,
        "last_update": updates[-1] if updates else None,
        "sparsity_at": {step: round(schedule.sparsity_at(step), 6) for step in _eighths(num_steps)},
    }


def _eighths(num_steps: int) -> list[int]:
    return sorted({round(num_steps * i / 8) for i in range(9)})
