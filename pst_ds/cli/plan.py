"""``pst-ds plan RUN.toml``: what a run would do, from names and shapes alone."""

from __future__ import annotations

import argparse
import math
from typing import Any

from pst_ds.cli.main import add_run_arguments, load_run_or_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "run file (TOML)")
    parser.add_argument("--ranks", type=int, help="ranks to plan for (default: the launcher's, or 1)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = load_run_or_folder(args)
    from pst_ds.parallel.ds_config import load_deepspeed_config, zero_stage
    from pst_ds.parallel.launch import launch_environment
    from pst_ds.train.model import head_names, load_tokenizer, meta_model
    from pst_ds.train.tasks import task_of

    ranks = args.ranks or launch_environment().world_size
    micro_batch_size = config.micro_batch_size(ranks)
    stage = zero_stage(load_deepspeed_config(config.deepspeed_config)) if config.deepspeed_config else None
    tokenizer = load_tokenizer(config)
    task = task_of(config)
    labels = task.label_names(config.data)
    num_examples = len(task.load(config.data, "train", tokenizer, labels))
    model = meta_model(config, labels, tokenizer, num_shards=ranks if stage == 3 else 1)
    num_steps = config.num_steps(num_examples)
    plan = {
        "ranks": ranks,
        "zero_stage": stage,
        "precision": config.train.precision,
        "micro_batch_size": micro_batch_size,
        "num_steps": num_steps,
        "num_examples": num_examples,
        "unit": task.unit,
        "trained_in_full": head_names(model, config),
        "layers": _layers(model),
        "updated_embeddings": _embeddings(model),
        **_counts(model, ranks, stage, config.train.precision),
        "schedule": _schedule(config, num_steps),
    }
    _print(plan)
    return plan


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


def _counts(model: Any, ranks: int, stage: int | None, precision: str) -> dict[str, Any]:
    """Parameters and bytes, as one rank will hold them."""
    params = list(model.parameters())
    trained = [p.numel() for p in params if p.requires_grad]
    shares = ranks if stage == 3 else 1
    return {
        "parameters": sum(p.numel() for p in params if p.is_floating_point()),
        "trained_parameters": sum(trained),
        "pruned_parameters": sum(layer["out_features"] * layer["in_features"] for layer in _layers(model)),
        "optimizer_bytes_per_rank": _optimizer_bytes(trained, ranks, stage, precision),
        "weight_bytes_per_rank": sum(math.ceil(p.numel() / shares) * p.element_size() for p in params),
        "mask_bytes": sum(p.numel() for n, p in model.named_parameters() if n.endswith("pst_mask")),
    }


def _optimizer_bytes(trained: list[int], ranks: int, stage: int | None, precision: str) -> int:
    """Two fp32 moments a trainable, and an fp32 master where the parameter itself is not it.

    Stage 3 splits every parameter over the ranks, stages 1 and 2 the flat whole of them; others keep all.
    """
    bytes_each = 8 if stage is None and precision == "fp32" else 12
    if stage == 3:
        return sum(math.ceil(count / ranks) for count in trained) * bytes_each
    return math.ceil(sum(trained) / (ranks if stage else 1)) * bytes_each


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


def _print(plan: dict[str, Any]) -> None:
    print(f"{len(plan['layers'])} layers to prune, {plan['pruned_parameters']:,} weights:")
    for layer in plan["layers"]:
        fused = f" x {layer['matrices']} matrices" if layer["matrices"] > 1 else ""
        print(
            f"  {layer['name']}  {layer['out_features']} x {layer['in_features']}{fused}, "
            f"{layer['factor_parameters']:,} factor parameters"
        )
    for e in plan["updated_embeddings"]:
        print(f"updated: {e['name']}  {e['rows']} x {e['width']}, {e['factor_parameters']:,} factor parameters")
    print(f"trained in full: {', '.join(plan['trained_in_full']) or 'nothing'}")
    share = plan["trained_parameters"] / plan["parameters"]
    print(f"trained parameters: {plan['trained_parameters']:,} of {plan['parameters']:,} ({share:.2%})")
    stage = "no DeepSpeed" if plan["zero_stage"] is None else f"ZeRO stage {plan['zero_stage']}"
    print(
        f"{plan['ranks']} ranks, {stage}, {plan['precision']}, {plan['micro_batch_size']} {plan['unit']} a micro-batch"
    )
    print(
        f"bytes a rank: optimizer {plan['optimizer_bytes_per_rank']:,}, parameters {plan['weight_bytes_per_rank']:,} "
        f"(masks, over all ranks: {plan['mask_bytes']:,})"
    )
    schedule = plan["schedule"]
    print(f"{plan['num_steps']} steps over {plan['num_examples']:,} {plan['unit']}")
    if schedule:
        print(
            f"{schedule['mask_updates']} mask updates, steps {schedule['first_update']} to {schedule['last_update']}: "
            + ", ".join(f"{step}: {value:.3f}" for step, value in schedule["sparsity_at"].items())
        )
