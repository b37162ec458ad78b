"""Search for the fastest way to run a batch that fits: micro-batches, checkpointing, sequence parallelism."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pst_ds.config.run import RunConfig
from pst_ds.errors import InputError
from pst_ds.planning.plan import Plan, PlanOptions, plan
from pst_ds.progress import Progress


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to run a batch, with the plan for it."""

    plan: Plan

    @property
    def settings(self) -> dict[str, str]:
        """The settings of the run, as for ``--set``."""
        run = self.plan.run
        return {
            "train.gradient_accumulation_steps": str(run.train.gradient_accumulation_steps),
            "train.sequence_parallel": str(run.train.sequence_parallel),
            "model.gradient_checkpointing": str(run.model.gradient_checkpointing).lower(),
        }

    @property
    def order(self) -> tuple[bool, float, int]:
        """Key by which the best choice sorts first: it fits, ends early and needs little memory."""
        judged = self.plan.verdict
        return judged.fits is False, judged.hours, judged.needed_bytes

    def as_json(self) -> dict[str, object]:
        """Return the choice as JSON values."""
        judged = self.plan.verdict
        return {
            "settings": self.settings,
            "micro_batch_size": self.plan.micro_batch_size,
            "peak_bytes": self.plan.memory.peak,
            "needed_bytes": judged.needed_bytes,
            "fits": judged.fits,
            "step": self.plan.time.step,
            "tokens_per_second": judged.tokens_per_second,
            "hours": judged.hours,
        }


def search(run: RunConfig, options: PlanOptions, found: Plan) -> list[Choice]:
    """Plan all :func:`ways` for the ranks of the plan ``found``; return the possible ones, best first."""
    planned: list[Choice] = []
    rejected: set[int] = set()
    wanted = list(ways(run, found))
    with Progress("search", len(wanted), "plans") as progress:
        for number, (shared_by, steps, checkpoints) in enumerate(wanted, 1):
            if shared_by not in rejected:
                try:
                    planned.append(Choice(plan(_changed(run, shared_by, steps, checkpoints), options)))
                except InputError:  # such as attention heads that ranks cannot share, for any micro-batch
                    rejected.add(shared_by)
            progress.at(number)
    return sorted(planned, key=lambda one: one.order)


def ways(run: RunConfig, found: Plan) -> Iterator[tuple[int, int, bool]]:
    """Yield the ways to split the batch of ``run`` over the ranks of ``found``, smallest micro-batches first.

    They are ranks that share a sequence, accumulation steps, and gradient checkpointing.
    """
    ranks, at_stage_3 = found.ranks, found.zero_stage == 3
    powers = [1 << i for i in range(run.train.batch_size.bit_length())]
    shared = [n for n in powers if ranks % n == 0] if at_stage_3 and run.task_facts.predicts_tokens else [1]
    for shared_by, steps in itertools.product(shared, reversed(powers)):
        if shared_by <= run.data.max_length and steps * ranks // shared_by <= run.train.batch_size:
            yield shared_by, steps, False
            yield shared_by, steps, True


def _changed(run: RunConfig, shared_by: int, steps: int, checkpoints: bool) -> RunConfig:
    """Return ``run`` with these settings. Raises ConfigError if they cannot be combined."""
    train = replace(run.train, gradient_accumulation_steps=steps, sequence_parallel=shared_by)
    model = replace(
        run.model,
        gradient_checkpointing=checkpoints,
        gradient_checkpointing_reentrant=checkpoints and run.model.gradient_checkpointing_reentrant,
        activation_offload=checkpoints and run.model.activation_offload,
    )
    return replace(run, train=train, model=model)
