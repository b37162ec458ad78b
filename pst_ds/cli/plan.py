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
    from pst_ds.planning.plan import Plan, PlannedLayer, PlannedSchedule
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
    "ZeRO",
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
    """Add the arguments of ``pst-ds plan``."""
    add = parser.add_argument
    add_run_arguments(parser, "run file (TOML)")
    add("--world-size", "--ranks", dest="ranks", type=count, metavar="N", help="ranks (default: the launcher's, or 1)")
    add("--no-data", action="store_true", help="needs only config.json and train.num_steps: no data, no tokenizer")
    machine = f"rates for the expected times: {', '.join(MACHINES)}, or a TOML file (default: by this machine)"
    add("--machine", metavar="FILE", help=machine)
    add("--memory", type=above(0), metavar="GB", help="gigabytes of memory per rank (default: the machine's)")
    add("--search", action="store_true", help="also find the fastest way to run the same batch that fits")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Print a plan, and what ``--search`` or a fix has found; return them as JSON values. Raises InputError."""
    # before the imports, which take seconds, so that a wrong setting is reported at once
    config = load_run_or_folder(args)
    from pst_ds.planning.plan import PlanOptions, plan, resolve_to_plan
    from pst_ds.planning.search import against_stage_2, cure, search

    options = PlanOptions(
        ranks=args.ranks,
        machine=args.machine,
        no_data=args.no_data,
        memory=round((args.memory or 0) * 1e9),  # the flag is in gigabytes
    )
    resolved = resolve_to_plan(config, options)
    planned = plan(resolved, options)
    print("\n".join(plan_lines(planned)))
    result = planned.as_json()
    result["exit_code"] = EXIT_DOES_NOT_FIT if planned.verdict.is_too_large else 0
    if args.search:
        choices = search(resolved, options, planned)
        print("\n".join(search_lines(choices)))
        print(_stages_line(choices, against_stage_2(resolved.run, planned)))
        result["search"] = [choice.as_json() for choice in choices]
    # not for None, where the memory of the machine is unknown; also where it is too close to tell
    if planned.verdict.fits is False:
        changed = cure(resolved, options, planned)
        print(f"to fix: {_cure(planned, changed)}")
        result["fix"] = None if changed is None else changed.as_json()
    return result


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan."""
    for part in (_layers, _memory, _steps, _time, _verdict):
        yield from part(plan)
    for remark in plan.remarks:
        yield f"note: {remark}"


def _layers(plan: Plan) -> Iterator[str]:
    """Yield what is pruned, and what is trained."""
    yield f"{len(plan.layers)} layers to prune, {plan.pruned_parameters:,} weights:"
    for name, group in layer_groups(plan.layers):
        yield f"  {name}  {_shape(group)}"
    for embedding in plan.updated_embeddings:
        yield (
            f"updated: {embedding.name}  {embedding.rows} x {embedding.width}, "
            f"{embedding.factor_parameters:,} factor parameters"
        )
    if plan.base_grid:
        yield f"their frozen weights: {plan.base_grid}"
    if plan.embedding_grid:
        yield f"frozen embedding and output layer: {plan.embedding_grid}"
    yield f"trained in full: {', '.join(plan.trained_in_full) or 'nothing'}"
    share = plan.trained_parameters / plan.parameters
    yield f"trained parameters: {plan.trained_parameters:,} of {plan.parameters:,} ({share:.2%})"


def _shape(group: Sequence[PlannedLayer]) -> str:
    """Describe layers of one shape: "2 times 8 experts of 60 x 32 x 2 matrices, 1,564 factor parameters each"."""
    layer = group[0]
    times = ""
    each = ""
    if len(group) > 1:
        times = f"{len(group)} times "
        each = " each"
    experts = ""
    if layer.experts > 1:
        experts = f"{layer.experts} experts of "
    # a layer counts the outputs and matrices of all its experts
    out_features = layer.out_features // layer.experts
    matrices = layer.matrices // layer.experts
    fused = ""
    if matrices > 1:
        fused = f" x {matrices} matrices"
    return (
        f"{times}{experts}{out_features} x {layer.in_features}{fused}, "
        f"{layer.factor_parameters:,} factor parameters{each}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    """Yield how the run is laid out over ranks, and the memory of a rank by its parts."""
    yield _layout(plan)
    memory = plan.memory
    yield f"memory of a rank: {bytes_text(memory.peak)} at the peak, {bytes_text(memory.resident)} all the time"
    parts = memory.as_dict()
    for key, text in MEMORY_LINES.items():
        if key == "activations" and plan.trace is None:
            # a model whose control flow depends on values
            yield f"  {text}: unknown, the model cannot be traced without values; not in the peak"
        elif parts[key]:
            yield f"  {text}: {bytes_text(parts[key])}"
    yield (
        f"a checkpoint: at most {bytes_text(plan.checkpoint_bytes)}, and a copy of a rank's share of it in host "
        "memory while it is written"
    )


def _layout(plan: Plan) -> str:
    """Describe ranks, copies of frozen weights, precision and micro-batches."""
    run = plan.run
    stage = f"ZeRO stage {plan.zero_stage}"
    if plan.zero_stage is None:
        stage = "no DeepSpeed"
    copies = ""
    if plan.copy_ranks == 1:
        copies = ", frozen weights whole on every rank"
    elif plan.copy_ranks > 1:
        copies = f", frozen weights also on {plan.copy_ranks} ranks each"
    shared = ""
    if run.train.sequence_parallel > 1:
        shared = f", shared by {run.train.sequence_parallel} ranks"
    checkpointed = ""
    if run.model.gradient_checkpointing:
        checkpointed = ", checkpointed"
    return (
        f"{plan.ranks} ranks, {stage}{copies}, {run.train.precision}, micro-batches of {plan.micro_batch_size} x "
        f"{run.data.max_length} tokens{shared}{checkpointed}"
    )


def _steps(plan: Plan) -> Iterator[str]:
    """Yield the steps of the run, what comes before them, and when masks change and weights are rounded."""
    examples = ""
    if plan.num_examples is not None:
        examples = f" over {plan.num_examples:,} {plan.unit}"
    yield f"{plan.num_steps} steps{examples}"
    yield from _finetuning(plan)
    yield from _start(plan)
    if plan.schedule is not None:
        yield _mask_updates(plan.schedule)
    rounding = plan.rounding
    if rounding is not None:
        yield f"weights rounded to {rounding.grid}, from step {rounding.start} on: {rounding.searches} searches"


def _finetuning(plan: Plan) -> Iterator[str]:
    """Yield the fine-tuning before the run, if there is one, with its memory and time."""
    tuned = plan.finetuning
    if tuned is None:
        return
    trained = f"{tuned.trained_parameters:,} of {tuned.parameters:,} parameters"
    yield f"before them, {tuned.num_steps} steps by {tuned.run.method} train {trained}: {tuned.run.output_dir}"
    expected = _seconds(3600 * tuned.verdict.hours)
    yield f"  memory of a rank: {bytes_text(tuned.memory.peak)} at the peak; expected on {plan.machine}: {expected}"


def _start(plan: Plan) -> Iterator[str]:
    """Yield the one-shot pruning before the first step, if there is one, with its cost."""
    start = plan.start
    if start is not None:
        lead = "before them," if plan.finetuning is None else "then"
        action = f"prune to {start['sparsity']} by"
        if start["method"] == CHANNELS:
            # removed channels are counted by a setting of their method, not by the sparsity
            action = "prune by"
        samples = f" on {start['samples']} examples"
        if start["method"] == "magnitude":
            # it looks at the weights only
            samples = ""
        yield f"{lead} all ranks {action} {start['method']}{samples}: {start['folder']}"
    cost = plan.start_cost
    if cost is not None:
        yield f"  memory of a rank, parts at different times: {_listed(cost.memory, bytes_text)}"
        yield f"  expected on {plan.machine}: {_listed(cost.time, _seconds)}; {_listed(cost.traffic, bytes_text)}"


def _mask_updates(schedule: PlannedSchedule) -> str:
    """Describe when masks change, and the sparsity at each eighth of the run."""
    updates = f"{schedule.mask_updates} mask updates, steps {schedule.first_update} to {schedule.last_update}"
    if schedule.mask_updates == 1:
        updates = f"masks are chosen once, at step {schedule.first_update}"
    sparsities = ", ".join(f"{step}: {value:.3f}" for step, value in schedule.sparsity_at.items())
    return f"{updates}: {sparsities}"


def _listed(parts: Mapping[str, float], as_text: Callable[[float], str]) -> str:
    """Return the parts that are not zero, with their names as words."""
    shown = []
    for name, value in parts.items():
        if value:
            shown.append(f"{name.replace('_', ' ')} {as_text(value)}")
    return ", ".join(shown)


def _time(plan: Plan) -> Iterator[str]:
    """Yield the expected times, the traffic between ranks, and a comparison with full fine-tuning."""
    time = plan.time
    yield (
        f"expected on {plan.machine}: a step {_seconds(time.step)}, a mask update {_seconds(time.update)}; masks take "
        f"{plan.share_of_masks:.2%} of the run"
    )
    yield _parts_of_step(plan)
    # a single rank receives nothing
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
    """Yield whether a rank has enough memory, and the speed and duration of the run."""
    judged = plan.verdict
    # on a CPU, where the memory of the process and of copies for checkpoints is added to the peak
    has_overhead = judged.needed_bytes != plan.memory.peak
    needed = f"memory: {bytes_text(judged.needed_bytes)}"
    if has_overhead:
        needed += ", with the process and its saves"
    if judged.capacity_bytes is not None:
        fit = _fit(judged, judged.capacity_bytes)
        yield f"{needed}, of {bytes_text(judged.capacity_bytes)} that a rank has: {fit}"
    elif has_overhead:
        # otherwise the memory of a rank was printed above
        yield f"{needed}, of a rank is enough; less than {bytes_text(judged.least_bytes)} is too little"
    mfu = ""
    if judged.mfu is not None:
        mfu = f", {judged.mfu:.0%} of the data sheet's products"
    yield (
        f"speed: {judged.tokens_per_second:,.0f} tokens a second, {judged.tokens_per_second_per_rank:,.0f} a rank"
        f"{mfu}; loading {_seconds(judged.load_seconds)}, a checkpoint {_seconds(judged.checkpoint_seconds)}"
    )
    yield (
        f"the run: {_seconds(3600 * judged.hours)}, {judged.rank_hours:,.2f} rank hours; the least batch of "
        f"these ranks is {judged.least_batch}"
    )


def _fit(judged: Verdict, capacity: int) -> str:
    """Say whether the run fits into ``capacity`` bytes of a rank."""
    margin = capacity - judged.needed_bytes
    if judged.fits:
        return f"fits, {margin / capacity:.0%} to spare"
    # the prediction is not exact: between the two limits a run may fit or not
    if capacity >= judged.least_bytes:
        return f"too close to tell, and {bytes_text(judged.least_bytes)} is the least"
    return f"does NOT fit, by {bytes_text(-margin)}"


def _cure(first: Plan, changed: Choice | None) -> str:
    """Return the flags that turn the run of ``first`` into one that fits, or advice if none has been found."""
    if changed is None:
        return "take a smaller model, shorter sequences, or offload_param in the DeepSpeed JSON"
    plan = changed.plan
    flags: list[str] = []
    if plan.ranks != first.ranks:
        flags.append(f"--ranks {plan.ranks}")
    flags += _set_flags(changed.changes(first))
    return f"{' '.join(flags)}: {bytes_text(plan.verdict.needed_bytes)} of a rank, a step {_seconds(plan.time.step)}"


def _set_flags(settings: Mapping[str, str]) -> list[str]:
    """Return the flags that change settings of a run, to be copied to a command line."""
    return [f"--set {name}={value}" for name, value in settings.items()]


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
                "none" if plan.zero_stage is None else str(plan.zero_stage),
                plan.placement if plan.zero_stage == 3 else "whole",
                bytes_text(plan.verdict.needed_bytes),
                _YES_NO[plan.verdict.fits],
                f"{plan.verdict.tokens_per_second:,.0f}",
            ]
        )
    yield f"of {len(choices)} ways to run the same batch, the best:"
    for row in aligned(rows):
        yield f"  {row}"
    best = choices[0]
    # also those that the run file has already, so that the line says all that was compared
    yield f"the first: {' '.join(_set_flags(best.settings))}"


def _stages_line(choices: Sequence[Choice], against: str) -> str:
    """Return a line that compares the best choices at ZeRO stages 2 and 3, or says what is ``against`` stage 2."""
    best: dict[int | None, Plan] = {}
    for choice in choices:
        best.setdefault(choice.plan.zero_stage, choice.plan)
    if against:
        return f"ZeRO stage 2 was not tried: {against}"
    if 2 not in best or 3 not in best:
        return "ZeRO stage 2 was tried: no way to run the batch is possible with it"
    compared = []
    for stage in (2, 3):
        plan = best[stage]
        fit = _YES_NO[plan.verdict.fits]
        compared.append(
            f"stage {stage} needs {bytes_text(plan.verdict.needed_bytes)} of a rank (fits: {fit}), receives "
            f"{bytes_text(plan.time.step_received)} and takes {_seconds(plan.time.step)} per step, of the host "
            f"{_seconds(plan.time.step_host)}"
        )
    return f"ZeRO {'; '.join(compared)}; stage 2 keeps frozen weights whole on every rank and gathers none"


def name_across_blocks(name: str) -> str:
    """Return the name that a layer shares with its counterparts in other blocks: "layers.*.mlp.up_proj"."""
    # a number that is a whole component of the name; others, as in "conv1", are part of what the module is
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def layer_groups(layers: Sequence[PlannedLayer]) -> list[tuple[str, list[PlannedLayer]]]:
    """Group layers of one shape whose names differ only in a number; return their common name and the layers."""
    groups: dict[tuple[object, ...], list[PlannedLayer]] = {}
    for layer in layers:
        key = (
            name_across_blocks(layer.name),
            layer.out_features,
            layer.in_features,
            layer.matrices,
            layer.factor_parameters,
        )
        groups.setdefault(key, []).append(layer)
    named: list[tuple[str, list[PlannedLayer]]] = []
    for (common_name, *_), group in groups.items():
        # a single layer has no counterparts to stand for
        name = group[0].name if len(group) == 1 else str(common_name)
        named.append((name, group))
    return named


def _seconds(seconds: float) -> str:
    """Format a duration as "1.5 hours", "2.0 minutes", "1.00 s" or "0.62 ms"."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    if seconds >= 120:
        return f"{seconds / 60:.1f} minutes"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms"
