"""Sequences that several ranks share: ``train.sequence_parallel`` against the rest of the run file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pst_ds.config.checks import ConfigError

if TYPE_CHECKING:
    from pst_ds.config.run import RunConfig


def require_sequences_to_share(run: RunConfig) -> None:
    """Raise ConfigError where ``train.sequence_parallel`` has nothing to cut evenly."""
    degree, length, facts = run.train.sequence_parallel, run.data.max_length, run.task_facts
    if degree == 1:
        return
    why = ""
    if not facts.predicts_tokens:
        why = f"is for language models, and task = {run.task!r} is another"
    elif not run.deepspeed_config:
        why = 'is for ZeRO-3; set deepspeed_config = "ds_configs/zero3.json"'
    elif length % degree:
        why = f"must divide data.max_length = {length}; make that {length - length % degree or degree}"
    elif run.distillation.teacher:
        why = f"is for models that teach themselves, and distillation.teacher = {run.distillation.teacher!r} is another"
    elif not facts.packs_text and run.distillation.hidden_states:
        why = f"cannot weigh hidden states of padded texts (task = {run.task!r}); set distillation.hidden_states = 0"
    if why:
        raise ConfigError(f"train.sequence_parallel = {degree} {why}")


def groups_of_ranks(degree: int, world_size: int) -> int:
    """Return how many groups of ``degree`` ranks, with sequences of their own each, there are. Raises ConfigError."""
    if world_size % degree:
        raise ConfigError(
            f"train.sequence_parallel = {degree} does not divide {world_size} ranks; start a multiple of {degree}, or "
            "set a divisor"
        )
    return world_size // degree
