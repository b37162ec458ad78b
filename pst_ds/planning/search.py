"""Search for the fastest way to run a batch that fits: micro-batches, checkpointing, sequence parallelism, hpZ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pst_ds.config.run import RunConfig
from pst_ds.errors import InputError
from pst_ds.planning.activations import Trace
from pst_ds.planning.machines import machine_of
from pst_ds.planning.plan import Plan, PlanOptions, plan
from pst_ds.progress import Progress

HPZ = "zero_hpz_partition_size"
"""DeepSpeed's setting for a second copy of the weights per node (ZeRO++), which the backward pass gathers from."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a batch."""

    accumulation: int
    checkpointing: bool
    shared_by: int
    """Ranks that share a sequence."""
    partition: int
    """Value of :data:`HPZ`; 1 for no second copy."""

    def of(self, run: RunConfig) -> RunConfig:
        """Return ``run`` with these settings. Raises ConfigError if they cannot be combined."""
        train = replace(run.train, gradient_accumulation_steps=self.accumulation, sequence_parallel=self.shared_by)
        checkpoints = self.checkpointing
        model = replace(
            run.model,
            gradient_checkpointing=checkpoints,
            gradient_checkpointing_reentrant=checkpoints and run.model.gradient_checkpointing_reentrant,
            activation_offload=checkpoints and run.model.activation_offload,
        )
        return replace(run, train=train, model=model)

    @property
    def zero(self) -> dict[str, int]:
        """The additional settings of ``zero_optimization`` in the DeepSpeed JSON."""
        return {} if self.partition == 1 else {HPZ: self.partition}

    @property
    def settings(self) -> dict[str, str]:
        """The settings of the run, as for ``--set``."""
        return {
            "train.gradient_accumulation_steps": str(self.accumulation),
            "train.sequence_parallel": str(self.shared_by),
            "model.gradient_checkpointing": str(self.checkpointing).lower(),
        }


@dataclass(frozen=True, slots=True)
class PlannedChoice:
    """A choice with the plan for it."""

    choice: Choice
    plan: Plan

    @property
    def order(self) -> tuple[bool, float, int]:
        """Key by which the best choice sorts first: it fits, ends early and needs little memory."""
        judged = self.plan.verdict
        return judged.fits is False, judged.hours, judged.needed_bytes

    def as_json(self) -> dict[str, object]:
        """Return the choice as JSON values."""
        judged = self.plan.verdict
        return {
            "settings": self.choice.settings,
            "zero_optimization": self.choice.zero,
            "micro_batch_size": self.plan.micro_batch_size,
            "peak_bytes": self.plan.memory.peak,
            "needed_bytes": judged.needed_bytes,
            "fits": judged.fits,
            "step": self.plan.time.step,
            "tokens_per_second": judged.tokens_per_second,
            "hours": judged.hours,
        }


def search(run: RunConfig, options: PlanOptions, found: Plan) -> list[PlannedChoice]:
    """Plan all :func:`choices` for the ranks of the plan ``found``; return the possible ones, best first."""
    planned: list[PlannedChoice] = []
    traces: dict[tuple[int, bool, int], Trace | None] = {}
    rejected: set[int] = set()
    wanted = list(choices(run, found))
    with Progress("search", len(wanted), "plans") as progress:
        for number, choice in enumerate(wanted, 1):
            key = choice.accumulation, choice.checkpointing, choice.shared_by
            if choice.shared_by not in rejected:
                try:
                    made = plan(choice.of(run), replace(options, trace=traces.get(key), zero=choice.zero))
                except InputError:  # such as attention heads that ranks cannot share, for any micro-batch
                    rejected.add(choice.shared_by)
                else:
                    traces[key] = made.trace
                    planned.append(PlannedChoice(choice, made))
            progress.at(number)
    return sorted(planned, key=lambda one: one.order)


def choices(run: RunConfig, found: Plan) -> Iterator[Choice]:
    """Yield the ways to split the batch of ``run`` over the ranks of ``found`` and to store it, smallest micro-batches
    first."""
    ranks, at_stage_3, node_size = found.ranks, found.zero_stage == 3, machine_of(found.machine).node_size
    powers = [1 << i for i in range(run.train.batch_size.bit_length())]
    shared = [n for n in powers if ranks % n == 0] if at_stage_3 and run.task_facts.predicts_tokens else [1]
    partitions = [1, node_size] if at_stage_3 and node_size < ranks and ranks % node_size == 0 else [1]
    for degree, steps in itertools.product(shared, reversed(powers)):
        if degree <= run.data.max_length and steps * ranks // degree <= run.train.batch_size:
            for checkpointing, partition in itertools.product((False, True), partitions):
                yield Choice(steps, checkpointing, degree, partition)
