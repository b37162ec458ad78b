"""A plan as lines of text."""

import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from pst_ds.text_table import bytes_text

Plan: TypeAlias = dict[str, Any]
"""A plan, or a part of one, as JSON values."""
MEMORY_LINES = {
    "weights": "weights (this rank's share)",
    "masks": "mask bits",
    "scales": "scales of rounded weights",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "reduce_bucket": "reduction bucket",
    "runtime": "libraries and threads",
    "teacher": "the teacher, whole",
    "gathers": "gathered parameters",
    "communication": "staging of a gather",
    "layer_work": "temporaries of a layer",
    "activations": "activations of a micro-batch",
    "packed": "a weight as its product lays it out, in place of the staging",
    "optimizer_step": "an optimizer step, at other times",
    "mask_update": "a mask update, at other times",
    "host": "in host memory (offloaded)",
}


def print_plan(plan: Plan) -> None:
    for lines in (_of_layers, _of_memory, _of_steps, _of_time, _of_verdict):
        for line in lines(plan):
            print(line)
    for remark in plan["remarks"]:
        print(f"note: {remark}")


def _of_layers(plan: Plan) -> Iterator[str]:
    yield f"{len(plan['layers'])} layers to prune, {plan['pruned_parameters']:,} weights:"
    for group in layer_groups(plan["layers"]):
        experts = group["experts"]
        each = f"{experts} experts of " if experts > 1 else ""
        matrices = group["matrices"] // experts
        fused = f" x {matrices} matrices" if matrices > 1 else ""
        times = f"{group['count']} times " if group["count"] > 1 else ""
        yield (
            f"  {group['pattern']}  {times}{each}{group['out_features'] // experts} x {group['in_features']}{fused}, "
            f"{group['factor_parameters']:,} factor parameters{' each' if times else ''}"
        )
    for e in plan["updated_embeddings"]:
        yield f"updated: {e['name']}  {e['rows']} x {e['width']}, {e['factor_parameters']:,} factor parameters"
    if plan["base_grid"]:
        yield f"their frozen weights: {plan['base_grid']}"
    if plan["embedding_grid"]:
        yield f"frozen embedding and output layer: {plan['embedding_grid']}"
    yield f"trained in full: {', '.join(plan['trained_in_full']) or 'nothing'}"
    share = plan["trained_parameters"] / plan["parameters"]
    yield f"trained parameters: {plan['trained_parameters']:,} of {plan['parameters']:,} ({share:.2%})"


def _of_memory(plan: Plan) -> Iterator[str]:
    stage = "no DeepSpeed" if plan["zero_stage"] is None else f"ZeRO stage {plan['zero_stage']}"
    shared = f", shared by {plan['sequence_parallel']} ranks" if plan["sequence_parallel"] > 1 else ""
    checkpointed = ", checkpointed" if plan["activation_checkpointing"] else ""
    yield (
        f"{plan['ranks']} ranks, {stage}, {plan['precision']}, micro-batches of {plan['micro_batch_size']} x "
        f"{plan['sequence']} tokens{shared}{checkpointed}"
    )
    memory = plan["memory_bytes_per_rank"]
    yield f"memory of a rank: {bytes_text(memory['peak'])} at the peak, {bytes_text(memory['resident'])} all the time"
    for key, text in MEMORY_LINES.items():
        if memory[key] is None:
            yield f"  {text}: unknown, the model cannot be traced without values; not in the peak"
        elif memory[key]:
            yield f"  {text}: {bytes_text(memory[key])}"
    yield (
        f"a checkpoint: at most {bytes_text(plan['checkpoint_bytes'])}, and a copy of a rank's share of it in host "
        "memory while it is written"
    )


def _of_steps(plan: Plan) -> Iterator[str]:
    examples = "" if plan["num_examples"] is None else f" over {plan['num_examples']:,} {plan['unit']}"
    yield f"{plan['num_steps']} steps{examples}"
    start, schedule = plan["start"], plan["schedule"]
    if start:
        text = "" if start["method"] == "magnitude" else f" on {start['samples']} examples"
        yield f"before them, rank 0 prunes to {start['sparsity']} by {start['method']}{text}: {start['folder']}"
    if schedule:
        yield (
            f"{schedule['mask_updates']} mask updates, steps {schedule['first_update']} to {schedule['last_update']}: "
            + ", ".join(f"{step}: {value:.3f}" for step, value in schedule["sparsity_at"].items())
        )
    rounding = plan["rounding"]
    if rounding:
        inputs = " and inputs to int8" if rounding["activation_bits"] == 8 else ""
        yield (
            f"weights rounded to {rounding['grid']}{inputs}, from step {rounding['start']} on: "
            f"{rounding['searches']} searches"
        )


def _of_time(plan: Plan) -> Iterator[str]:
    time = plan["time"]
    yield (
        f"expected on {plan['machine']}: a step {_seconds(time['step'])} ({bytes_text(time['step_received'])} received "
        f"by a rank), a mask update {_seconds(time['update'])} ({bytes_text(time['update_received'])}); masks take "
        f"{time['share_of_masks']:.2%} of the run"
    )
    yield (
        f"full fine-tuning of the same model there: a step {_seconds(time['full_step'])}; PST takes "
        f"{time['step'] / time['full_step']:.2f} of it, {time['over_full']:.2f} with a mask update in every step"
    )


def _of_verdict(plan: Plan) -> Iterator[str]:
    found = plan["verdict"]
    peak = plan["memory_bytes_per_rank"]["peak"]
    beside = ", with the process and its saves" if found["needed_bytes"] != peak else ""
    needed = f"memory: {bytes_text(found['needed_bytes'])}{beside}"
    if found["fits"] is None:
        if beside:
            yield f"{needed}, of a rank is enough; less than {bytes_text(found['least_bytes'])} is too little"
    else:
        yield f"{needed}, of {bytes_text(found['capacity_bytes'])} that a rank has: {_fit_text(found)}"
    mfu = "" if found["mfu"] is None else f", {found['mfu']:.0%} of the data sheet's products"
    yield (
        f"speed: {found['tokens_per_second']:,.0f} tokens a second, {found['tokens_per_second_per_rank']:,.0f} a rank"
        f"{mfu}; loading {_seconds(found['load_seconds'])}, a checkpoint {_seconds(found['checkpoint_seconds'])}"
    )
    cost = "" if found["cost"] is None else f", costs {found['cost']:,.2f}"
    yield (
        f"the run: {_seconds(3600 * found['hours'])}, {found['rank_hours']:,.2f} rank hours{cost}; the least batch of "
        f"these ranks is {found['least_batch']}"
    )


def _fit_text(found: Plan) -> str:
    margin, capacity = found["margin_bytes"], found["capacity_bytes"]
    if found["fits"]:
        return f"fits, {margin / capacity:.0%} to spare"
    if capacity >= found["least_bytes"]:
        return f"too close to tell, and {bytes_text(found['least_bytes'])} is the least"
    return f"does NOT fit, by {bytes_text(-margin)}"


def name_across_blocks(name: str) -> str:
    """Return the name that a layer shares with its counterparts in other blocks: "layers.*.mlp.up_proj"."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def layer_groups(layers: list[Plan]) -> list[Plan]:
    """Group layers of one shape whose names differ only in a number, with their ``count``."""
    groups: dict[tuple[object, ...], Plan] = {}
    for layer in layers:
        pattern = name_across_blocks(layer["name"])
        key = (pattern, layer["out_features"], layer["in_features"], layer["matrices"], layer["factor_parameters"])
        group = groups.setdefault(key, {**layer, "pattern": layer["name"], "count": 0})
        group["count"] += 1
        if group["count"] > 1:
            group["pattern"] = pattern
    return list(groups.values())


def _seconds(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    if seconds >= 120:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
