"""Search for the fastest way to run a batch that fits, and for the smallest change with which a run fits."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pst_ds.config.run import RunConfig
from pst_ds.errors import InputError
from pst_ds.parallel.ds_config import load_deepspeed_config, zero_stage
from pst_ds.planning.machines import machine_of
from pst_ds.planning.plan import Plan, PlanOptions, plan_resolved
from pst_ds.progress import Progress
from pst_ds.train.resolved import ResolvedRun

AS_FAST = 1.01
"""Runs count as equally fast if they differ by at most this factor: predictions are less exact."""
LEAST_MARGIN = 0.1
"""Share of the memory that the best ways leave: predicted peaks are off by up to a tenth."""
STAGE_2_FILE = "zero2.json"
"""Name of the DeepSpeed JSON, next to the run's, with which a search tries ZeRO stage 2."""
STAGE_3_FILE = "zero3.json"
"""The same for a cure of a run at stage 2."""
MOST_DOUBLINGS = 6
"""How often :func:`cure` doubles the ranks."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a batch, with the plan for it."""

    plan: Plan

    @property
    def fits(self) -> bool:
        return self.plan.verdict.fits is not False

    @property
    def tightness(self) -> int:
        """0 if it fits with a margin, or the memory is unknown; 1 if it fits; 2 if it does not."""
        judged = self.plan.verdict
        if judged.margin_bytes is None or judged.capacity_bytes is None:
            return 0
        return 2 - bool(judged.fits) - (judged.margin_bytes >= LEAST_MARGIN * judged.capacity_bytes)

    @property
    def settings(self) -> dict[str, str]:
        """The settings of the run that a search or a cure may change, with their values as in TOML."""
        run = self.plan.run
        settings = {
            "train.batch_size": str(run.train.batch_size),
            "train.gradient_accumulation_steps": str(run.train.gradient_accumulation_steps),
            "train.sequence_parallel": str(run.train.sequence_parallel),
            "train.expert_parallel": str(run.train.expert_parallel),
            "model.gradient_checkpointing": str(run.model.gradient_checkpointing).lower(),
            "model.base_placement": self.plan.placement,
            "model.base_bits": str(run.model.base_bits),
            "model.embedding_bits": str(run.model.embedding_bits),
        }
        if run.deepspeed_config:
            settings["deepspeed_config"] = run.deepspeed_config
        if run.model.recomputed_blocks is not None:
            settings["model.recomputed_blocks"] = str(run.model.recomputed_blocks)
        return settings

    def changes(self, found: Plan) -> dict[str, str]:
        """Return the settings that differ from those of ``found``."""
        before = Choice(found).settings
        changed = {name: value for name, value in self.settings.items() if before.get(name) != value}
        is_unset = "model.recomputed_blocks" in before and self.plan.run.model.recomputed_blocks is None
        if is_unset and self.plan.run.model.gradient_checkpointing:
            # a setting cannot be unset: name all blocks
            changed["model.recomputed_blocks"] = str(self.plan.num_blocks)
        return changed

    def as_json(self) -> dict[str, object]:
        """Return the choice as JSON values."""
        judged = self.plan.verdict
        return {
            "settings": self.settings,
            "ranks": self.plan.ranks,
            "zero_stage": self.plan.zero_stage,
            "micro_batch_size": self.plan.micro_batch_size,
            "peak_bytes": self.plan.memory.peak,
            "needed_bytes": judged.needed_bytes,
            "fits": judged.fits,
            "step": self.plan.time.step,
            "tokens_per_second": judged.tokens_per_second,
            "hours": judged.hours,
        }


def search(resolved: ResolvedRun, options: PlanOptions, first: Plan) -> list[Choice]:
    """Plan all :func:`ways` for the ranks of ``first``, the plan of the run; return the possible ones, best first.

    A run at ZeRO stage 3 is planned at stage 2 too, unless :func:`against_stage_2` says why not. The best way at the
    run's stage is also planned with experts divided among ranks, and then with other placements of frozen weights; the
    best of all with fewer blocks that recompute their activations.
    The best fit with a margin, and are the fastest; of equally fast ones, they keep the network busy for the shortest
    time and then need the least memory.
    """
    planned: list[Choice] = []
    run = resolved.run
    tries_stage_2 = not against_stage_2(run, first)

    def add(changed: RunConfig, options: PlanOptions) -> None:
        with suppress(InputError):  # such as attention heads that ranks cannot share
            planned.append(Choice(plan_resolved(resolved.with_settings(changed), options, first.data)))

    wanted = list(ways(run, first, machine_of(first.machine).node_size))
    with Progress("search", len(wanted), "plans") as progress:
        for number, way in enumerate(wanted, 1):
            add(_changed(run, *way), options)
            progress.at(number)
    for kind in (_dividing, _placing):
        best = _sorted(planned)[0].plan
        traced = replace(options, trace=best.trace)  # the micro-batch is the same
        for changed_run in kind(best):
            add(changed_run, traced)
    if tries_stage_2:
        for choice in _undivided(planned):
            # operators and activations do not depend on the stage, and gathers do not count at stage 2
            add(_at_stage_2(choice.plan.run), replace(options, trace=choice.plan.trace))
    for changed_run in _keeping(_sorted(planned)[0].plan):
        # traced anew, since more activations are kept
        add(changed_run, options)
    return _sorted(planned)


def against_stage_2(run: RunConfig, first: Plan) -> str:
    """Return why a search does not try ZeRO stage 2 for ``run`` with the plan ``first``; "" if it does."""
    if first.zero_stage == 2:
        return "the run has it already"
    if first.zero_stage != 3:
        return "the run is not at stage 3"
    if first.ranks == 1:
        return "a single rank holds everything at any stage"
    file = _stage_2_file(run)
    if not file.is_file():
        return f"{file} does not exist; copy ds_configs/zero2.json there"
    try:
        stage = zero_stage(load_deepspeed_config(file))
    except InputError as error:
        return str(error)
    return "" if stage == 2 else f"{file} is of stage {stage}"


def _stage_2_file(run: RunConfig) -> Path:
    return Path(run.deepspeed_config).with_name(STAGE_2_FILE)


def _at_stage_2(run: RunConfig) -> RunConfig:
    return replace(run, deepspeed_config=str(_stage_2_file(run)))


def _undivided(planned: Sequence[Choice]) -> list[Choice]:
    """Return one choice for each way to split the batch, if stage 2 can run it: no rank shares sequences or experts."""
    by_way: dict[tuple[int, bool], Choice] = {}
    for choice in planned:
        train = choice.plan.run.train
        if train.sequence_parallel == 1 and train.expert_parallel == 1:
            way = train.gradient_accumulation_steps, choice.plan.run.model.gradient_checkpointing
            by_way.setdefault(way, choice)  # the placement of frozen weights is stage 3's
    return list(by_way.values())


def _sorted(planned: Sequence[Choice]) -> list[Choice]:
    least = min((one.tightness, one.plan.verdict.hours) for one in planned)[1]

    def order(one: Choice) -> tuple[int, bool, float, float, int]:
        judged = one.plan.verdict
        # stage 2 needs most memory, so it is for a run that certainly fits
        may_lack_memory = one.plan.zero_stage == 2 and not judged.fits
        # in steps of a percent, below which predictions do not tell what is faster
        slower = 0
        if judged.hours > least:
            slower = math.floor(math.log(judged.hours / least, AS_FAST))
        return one.tightness, may_lack_memory, slower, one.plan.time.step_network, judged.needed_bytes

    return sorted(planned, key=order)


def _dividing(found: Plan) -> Iterator[RunConfig]:
    """Yield the run of ``found`` with its experts divided among more or fewer ranks."""
    numbers = {layer.experts for layer in found.layers if layer.experts > 1}
    if not numbers or found.zero_stage != 3:
        return
    # each rank owns equally many experts of every stack
    most = math.gcd(found.ranks, *numbers)
    for degree in _powers(most):
        if most % degree == 0 and degree != found.run.train.expert_parallel:
            yield _with(found.run, "train", expert_parallel=degree)


def _placing(found: Plan) -> Iterator[RunConfig]:
    """Yield the run of ``found`` with other placements of frozen weights."""
    if found.zero_stage != 3 or found.ranks == 1:
        return
    placements = ["sharded", "replicated"]
    if machine_of(found.machine).node_size < found.ranks:
        # in a single node, its copy would be the shards themselves
        placements.insert(1, "node")
    for placement in placements:
        if placement != found.placement:
            yield _with(found.run, "model", base_placement=placement)


def _keeping(found: Plan) -> Iterator[RunConfig]:
    """Yield the run of ``found`` with three, two and one quarter of the blocks that recompute their activations."""
    if found.run.model.gradient_checkpointing and not found.run.model.activation_offload:
        for quarters in (3, 2, 1):
            if num_blocks := found.num_blocks * quarters // 4:
                yield _with(found.run, "model", recomputed_blocks=num_blocks)


def ways(run: RunConfig, found: Plan, node_size: int) -> Iterator[tuple[int, int, bool]]:
    """Yield the ways to split the batch of ``run`` over the ranks of ``found``, smallest micro-batches first.

    They are (ranks of a node that share a sequence, accumulation steps, gradient checkpointing).
    """
    ranks = found.ranks
    powers = _powers(run.train.batch_size)
    degrees = [1]
    if found.zero_stage == 3 and run.task_facts.predicts_tokens:
        # exchanges between nodes would take longer than the attention
        degrees = [n for n in powers if ranks % n == 0 and n <= node_size]
    for shared_by, steps in itertools.product(degrees, reversed(powers)):
        if shared_by > run.data.max_length or steps * ranks // shared_by > run.train.batch_size:
            continue
        for checkpoints in (False, True):
            yield shared_by, steps, checkpoints


def cure(resolved: ResolvedRun, options: PlanOptions, first: Plan) -> Choice | None:
    """Return the first change with which the run of the plan ``first`` fits, planned; None if none does.

    The first that suffices alone of: smaller micro-batches, checkpointing, stage 3 in place of 2, another placement of
    frozen weights, shared sequences and a 4-bit base; or as many of them together, in this order, as do; or else more
    ranks.
    """
    machine = machine_of(first.machine)
    run = resolved.run

    def planned(changed: RunConfig, ranks: int = first.ranks) -> Choice | None:
        with suppress(InputError):  # such as attention heads that ranks cannot share
            if ranks > first.ranks:
                least = changed.train.groups_of_ranks(ranks) * changed.train.gradient_accumulation_steps
                changed = _with(changed, "train", batch_size=max(changed.train.batch_size, least))
            asked = replace(options, ranks=ranks)
            return Choice(plan_resolved(resolved.with_settings(changed), asked, first.data))
        return None

    def strongest(changes: Sequence[RunConfig]) -> Choice | None:
        return next((one for changed in reversed(changes) if (one := planned(changed))), None)

    kinds = [partial(kind, ranks=first.ranks, node_size=machine.node_size) for kind in _REMEDIES]
    for kind in kinds:
        changes = kind(run)
        if (most := strongest(changes)) and most.fits:
            return next(one for changed in changes if (one := planned(changed)) and one.fits)
    changed = run
    for kind in kinds:
        if most := strongest(kind(changed)):
            changed = most.plan.run
            if most.fits:
                return most
    for base in (run, changed):
        for ranks in (first.ranks << i for i in range(1, MOST_DOUBLINGS + 1)):
            if (one := planned(base, ranks)) and one.fits:
                return one
    return None


def _accumulating(run: RunConfig, ranks: int, node_size: int) -> list[RunConfig]:
    # with more steps, a micro-batch would have less than an example
    most = run.train.batch_size // run.train.groups_of_ranks(ranks)
    changes = []
    for steps in _powers(most):
        if steps > run.train.gradient_accumulation_steps:
            changes.append(_with(run, "train", gradient_accumulation_steps=steps))
    return changes


def _checkpointing(run: RunConfig, ranks: int, node_size: int) -> list[RunConfig]:
    if run.model.gradient_checkpointing and run.model.recomputed_blocks is None:
        return []
    return [_with(run, "model", gradient_checkpointing=True, recomputed_blocks=None)]


def _at_stage_3(run: RunConfig, ranks: int, node_size: int) -> list[RunConfig]:
    """Stage 3 in place of 2, by a ``zero3.json`` next to the run's DeepSpeed JSON."""
    if not run.deepspeed_config or zero_stage(load_deepspeed_config(run.deepspeed_config)) != 2:
        return []
    file = Path(run.deepspeed_config).with_name(STAGE_3_FILE)
    return [replace(run, deepspeed_config=str(file))] if file.is_file() else []


def _placed(run: RunConfig, ranks: int, node_size: int) -> list[RunConfig]:
    return [_with(run, "model", base_placement=placement) for placement in ("node", "sharded")]


def _sharing(run: RunConfig, ranks: int, node_size: int) -> list[RunConfig]:
    """A group of n ranks has n times the examples, in as many more steps."""
    if not run.task_facts.predicts_tokens:
        return []
    changes = []
    before = run.train.sequence_parallel
    for degree in _powers(node_size):
        if degree > before and ranks % degree == 0:
            steps = run.train.gradient_accumulation_steps * degree // before
            changes.append(_with(run, "train", sequence_parallel=degree, gradient_accumulation_steps=steps))
    return changes


def _quantised(run: RunConfig, ranks: int, node_size: int) -> list[RunConfig]:
    return [_with(run, "model", base_bits=4, embedding_bits=bits) for bits in (run.model.embedding_bits, 4)]


_REMEDIES = _accumulating, _checkpointing, _at_stage_3, _placed, _sharing, _quantised
"""Changes that need less memory, the mildest of a kind first."""


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _with(run: RunConfig, section: str, **settings: object) -> RunConfig:
    return replace(run, **{section: replace(getattr(run, section), **settings)})


def _changed(run: RunConfig, shared_by: int, steps: int, checkpoints: bool) -> RunConfig:
    """Return ``run`` with these settings. Raises ConfigError if they cannot be combined."""
    run = _with(run, "train", gradient_accumulation_steps=steps, sequence_parallel=shared_by)
    return _with(
        run,
        "model",
        gradient_checkpointing=checkpoints,
        recomputed_blocks=None,
        gradient_checkpointing_reentrant=checkpoints and run.model.gradient_checkpointing_reentrant,
        activation_offload=checkpoints and run.model.activation_offload,
    )
