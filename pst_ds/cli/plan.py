"""``pst-ds plan RUN.toml``: predict memory and time of a run from names and shapes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pst_ds.cli.main import above, add_run_arguments, count, load_run_or_folder
from pst_ds.config.one_shot import CHANNELS
from pst_ds.planning.machines import MACHINES, machine_of
from pst_ds.text_table import aligned, bytes_text

if TYPE_CHECKING:
    from pst_ds.planning.plan import Plan, PlannedLayer
    from pst_ds.planning.search import Choice
    from pst_ds.planning.verdict import Verdict

MEMORY_LINES = {
    "weights": "weights (this rank's share)",
    "masks": "mask bits",
    "copies": "a copy of frozen weights and masks",
    "scales": "scales of quantised weights",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "flat_factors": "factors and their gradients, whole",
    "reduce_bucket": "reduction bucket",
    "runtime": "libraries and threads",
    "teacher": "the teacher, whole",
    "sums": "sums for schedule.solves",
    "gathers": "gathered parameters",
    "communication": "staging of a gather",
    "layer_work": "temporaries of a layer",
    "activations": "activations of a micro-batch",
    "packed": "a weight in the layout of its product, in place of the staging",
    "optimizer_step": "an optimizer step, at other times",
    "mask_update": "a mask update, at other times",
    "host": "in host memory (offloaded)",
}
EXIT_DOES_NOT_FIT = 3
"""Exit code for a run that certainly needs more memory than a rank has: ``pst-ds plan ... && sbatch ...`` stops."""
_SHOWN = 5
"""Choices of a search that are printed."""
_COLUMNS = (
    "",
    "micro-batch",
    "accumulated",
    "checkpointed",
    "ranks a sequence",
    "ranks of experts",
    "frozen",
    "memory",
    "fits",
    "tokens/s",
)
"""Head of the table of a search."""
_YES_NO = {True: "yes", False: "no", None: "?"}
FLAGS = {"machine": "--machine", "no_data": "--no-data"}
"""Flags for the settings that messages of this verb name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_run_arguments(parser, "run file (TOML)")
    add("--world-size", "--ranks", dest="ranks", type=count, metavar="N", help="ranks (default: the launcher's, or 1)")
    add("--no-data", action="store_true", help="needs only config.json and train.num_steps: no data, no tokenizer")
    machine = f"rates for the expected times: {', '.join(MACHINES)}, or a TOML file (default: by this machine)"
    add("--machine", metavar="FILE", help=machine)
    add("--memory", type=above(0), metavar="GB", help="gigabytes of memory per rank (default: the machine's)")
    add("--search", action="store_true", help="also find the fastest way to run the same batch that fits")


def run(args: argparse.Namespace) -> dict[str, object]:
    config = load_run_or_folder(args)
    from pst_ds.planning.plan import PlanOptions, plan, resolve_to_plan
    from pst_ds.planning.search import cure, search

    options = PlanOptions(
        ranks=args.ranks,
        machine=args.machine,
        no_data=args.no_data,
        memory=round((args.memory or 0) * 1e9),  # the flag is in gigabytes
    )
    resolved = resolve_to_plan(config, options)
    planned = plan(resolved, options)
    print("\n".join(plan_lines(planned)))
    result = planned.as_json() | {"exit_code": EXIT_DOES_NOT_FIT if planned.verdict.is_too_large else 0}
    if args.search:
        choices = search(resolved, options, planned)
        print("\n".join(search_lines(choices)))
        result["search"] = [choice.as_json() for choice in choices]
    if planned.verdict.fits is False:
        changed = cure(resolved, options, planned)
        print(f"to fix: {_cure(planned, changed)}")
        result["fix"] = changed and changed.as_json()
    return result


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan."""
    for part in (_layers, _memory, _steps, _time, _verdict):
        yield from part(plan)
    for remark in plan.remarks:
        yield f"note: {remark}"


def _layers(plan: Plan) -> Iterator[str]:
    yield f"{len(plan.layers)} layers to prune, {plan.pruned_parameters:,} weights:"
    for name, group in layer_groups(plan.layers):
        layer = group[0]
        each = f"{layer.experts} experts of " if layer.experts > 1 else ""
        matrices = layer.matrices // layer.experts
        fused = f" x {matrices} matrices" if matrices > 1 else ""
        times = f"{len(group)} times " if len(group) > 1 else ""
        yield (
            f"  {name}  {times}{each}{layer.out_features // layer.experts} x {layer.in_features}{fused}, "
            f"{layer.factor_parameters:,} factor parameters{' each' if times else ''}"
        )
    for e in plan.updated_embeddings:
        yield f"updated: {e.name}  {e.rows} x {e.width}, {e.factor_parameters:,} factor parameters"
    if plan.base_grid:
        yield f"their frozen weights: {plan.base_grid}"
    if plan.embedding_grid:
        yield f"frozen embedding and output layer: {plan.embedding_grid}"
    yield f"trained in full: {', '.join(plan.trained_in_full) or 'nothing'}"
    share = plan.trained_parameters / plan.parameters
    yield f"trained parameters: {plan.trained_parameters:,} of {plan.parameters:,} ({share:.2%})"


def _memory(plan: Plan) -> Iterator[str]:
    stage = "no DeepSpeed" if plan.zero_stage is None else f"ZeRO stage {plan.zero_stage}"
    run = plan.run
    degree = run.train.sequence_parallel
    shared = f", shared by {degree} ranks" if degree > 1 else ""
    checkpointed = ", checkpointed" if run.model.gradient_checkpointing else ""
    copies = ""
    if plan.copy_ranks == 1:
        copies = ", frozen weights whole on every rank"
    elif plan.copy_ranks > 1:
        copies = f", frozen weights also on {plan.copy_ranks} ranks each"
    yield (
        f"{plan.ranks} ranks, {stage}{copies}, {run.train.precision}, micro-batches of {plan.micro_batch_size} x "
        f"{run.data.max_length} tokens{shared}{checkpointed}"
    )
    memory = plan.memory
    yield f"memory of a rank: {bytes_text(memory.peak)} at the peak, {bytes_text(memory.resident)} all the time"
    parts = memory.as_dict()
    for key, text in MEMORY_LINES.items():
        if key == "activations" and plan.trace is None:
            yield f"  {text}: unknown, the model cannot be traced without values; not in the peak"
        elif parts[key]:
            yield f"  {text}: {bytes_text(parts[key])}"
    yield (
        f"a checkpoint: at most {bytes_text(plan.checkpoint_bytes)}, and a copy of a rank's share of it in host "
        "memory while it is written"
    )


def _steps(plan: Plan) -> Iterator[str]:
    examples = "" if plan.num_examples is None else f" over {plan.num_examples:,} {plan.unit}"
    yield f"{plan.num_steps} steps{examples}"
    start = plan.start
    schedule = plan.schedule
    rounding = plan.rounding
    tuned = plan.finetuning
    if tuned is not None:
        trained = f"{tuned.trained_parameters:,} of {tuned.parameters:,} parameters"
        yield f"before them, {tuned.num_steps} steps by {tuned.run.method} train {trained}: {tuned.run.output_dir}"
        expected = _seconds(3600 * tuned.verdict.hours)
        yield f"  memory of a rank: {bytes_text(tuned.memory.peak)} at the peak; expected on {plan.machine}: {expected}"
    if start:
        samples = "" if start["method"] == "magnitude" else f" on {start['samples']} examples"
        lead = "then" if tuned else "before them,"
        what = "prune by" if start["method"] == CHANNELS else f"prune to {start['sparsity']} by"
        yield f"{lead} all ranks {what} {start['method']}{samples}: {start['folder']}"
    cost = plan.start_cost
    if cost is not None:
        yield f"  memory of a rank, parts at different times: {_listed(cost.memory, bytes_text)}"
        yield f"  expected on {plan.machine}: {_listed(cost.time, _seconds)}; {_listed(cost.traffic, bytes_text)}"
    if schedule:
        sparsities = ", ".join(f"{step}: {value:.3f}" for step, value in schedule.sparsity_at.items())
        updates = f"{schedule.mask_updates} mask updates, steps {schedule.first_update} to {schedule.last_update}"
        if schedule.mask_updates == 1:
            updates = f"masks are chosen once, at step {schedule.first_update}"
        yield f"{updates}: {sparsities}"
    if rounding:
        yield f"weights rounded to {rounding.grid}, from step {rounding.start} on: {rounding.searches} searches"


def _listed(parts: Mapping[str, float], as_text: Callable[[float], str]) -> str:
    """Return the parts that are not zero, with their names as words."""
    shown = []
    for name, value in parts.items():
        if value:
            shown.append(f"{name.replace('_', ' ')} {as_text(value)}")
    return ", ".join(shown)


def _time(plan: Plan) -> Iterator[str]:
    time = plan.time
    yield (
        f"expected on {plan.machine}: a step {_seconds(time.step)}, a mask update {_seconds(time.update)}; masks take "
        f"{plan.share_of_masks:.2%} of the run"
    )
    yield _parts_of_step(plan)
    if time.step_received:
        yield (
            f"received by a rank, and of it from other nodes: in a step {bytes_text(time.step_received)}, "
            f"{bytes_text(time.step_between_nodes)}; in a mask update {bytes_text(time.update_received)}, "
            f"{bytes_text(time.update_between_nodes)}"
        )
    yield (
        f"full fine-tuning of the same model there: a step {_seconds(time.full_step)}; PST takes "
        f"{time.step / time.full_step:.2f} of it, {time.over_full:.2f} with a mask update in every step"
    )


def _parts_of_step(plan: Plan) -> str:
    """Return a line on the time of products, network and host in a step, and which of them bounds it."""
    time = plan.time
    parts = (
        f"  products {_seconds(time.step_compute)}, network {_seconds(time.step_network)}, "
        f"host {_seconds(time.step_host)}"
    )
    bound = time.step_bound
    if machine_of(plan.machine).device == "cpu":  # the host is what computes
        return f"{parts}, one after another"
    verb = "bound" if bound == "products" else "bounds"
    return f"{parts}, at the same time: the {bound} {verb} the step"


def _verdict(plan: Plan) -> Iterator[str]:
    judged = plan.verdict
    has_overhead = judged.needed_bytes != plan.memory.peak
    overhead = ", with the process and its saves" if has_overhead else ""
    needed = f"memory: {bytes_text(judged.needed_bytes)}{overhead}"
    if judged.capacity_bytes is not None:
        fit = _fit(judged, judged.capacity_bytes)
        yield f"{needed}, of {bytes_text(judged.capacity_bytes)} that a rank has: {fit}"
    elif has_overhead:  # else the memory of a rank was printed above
        yield f"{needed}, of a rank is enough; less than {bytes_text(judged.least_bytes)} is too little"
    mfu = "" if judged.mfu is None else f", {judged.mfu:.0%} of the data sheet's products"
    yield (
        f"speed: {judged.tokens_per_second:,.0f} tokens a second, {judged.tokens_per_second_per_rank:,.0f} a rank"
        f"{mfu}; loading {_seconds(judged.load_seconds)}, a checkpoint {_seconds(judged.checkpoint_seconds)}"
    )
    yield (
        f"the run: {_seconds(3600 * judged.hours)}, {judged.rank_hours:,.2f} rank hours; the least batch of "
        f"these ranks is {judged.least_batch}"
    )


def _fit(judged: Verdict, capacity: int) -> str:
    margin = capacity - judged.needed_bytes
    if judged.fits:
        return f"fits, {margin / capacity:.0%} to spare"
    if capacity >= judged.least_bytes:
        return f"too close to tell, and {bytes_text(judged.least_bytes)} is the least"
    return f"does NOT fit, by {bytes_text(-margin)}"


def _cure(first: Plan, changed: Choice | None) -> str:
    if changed is None:
        return "take a smaller model, shorter sequences, or offload_param in the DeepSpeed JSON"
    plan = changed.plan
    words = [f"--set {name}={value}" for name, value in changed.changes(first).items()]
    if plan.ranks != first.ranks:
        words.insert(0, f"--ranks {plan.ranks}")
    return f"{' '.join(words)}: {bytes_text(plan.verdict.needed_bytes)} of a rank, a step {_seconds(plan.time.step)}"


def _recomputes(plan: Plan) -> str:
    """Return the cell that says whether blocks recompute their activations, or how many do."""
    if plan.run.model.recomputed_blocks is None:
        return _YES_NO[plan.run.model.gradient_checkpointing]
    return f"{plan.run.model.recomputed_blocks} of {plan.num_blocks}"


def search_lines(choices: Sequence[Choice]) -> Iterator[str]:
    """Yield a table of the best choices, and the settings of the first."""
    rows = [list(_COLUMNS)]
    for place, choice in enumerate(choices[:_SHOWN], 1):
        plan = choice.plan
        rows.append(
            [
                str(place),
                str(plan.micro_batch_size),
                str(plan.run.train.gradient_accumulation_steps),
                _recomputes(plan),
                str(plan.run.train.sequence_parallel),
                str(plan.run.train.expert_parallel),
                plan.placement,
                bytes_text(plan.verdict.needed_bytes),
                _YES_NO[plan.verdict.fits],
                f"{plan.verdict.tokens_per_second:,.0f}",
            ]
        )
    yield f"of {len(choices)} ways to run the same batch, the best:"
    for row in aligned(rows):
        yield f"  {row}"
    best = choices[0]
    yield "the first: " + " ".join(f"--set {name}={value}" for name, value in best.settings.items())


def name_across_blocks(name: str) -> str:
    """Return the name that a layer shares with its counterparts in other blocks: "layers.*.mlp.up_proj"."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def layer_groups(layers: Sequence[PlannedLayer]) -> list[tuple[str, list[PlannedLayer]]]:
    """Group layers of one shape whose names differ only in a number; return their common name and the layers."""
    groups: dict[tuple[object, ...], list[PlannedLayer]] = {}
    for layer in layers:
        shape = layer.out_features, layer.in_features, layer.matrices, layer.factor_parameters
        groups.setdefault((name_across_blocks(layer.name), *shape), []).append(layer)
    return [(group[0].name if len(group) == 1 else str(key[0]), group) for key, group in groups.items()]


def _seconds(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    if seconds >= 120:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
