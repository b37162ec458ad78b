"""Steps, batches and learning rates, in the run file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from pst_ds.config.checks import ConfigError, Positive, Rate, Share, check_fields

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Steps, batches and learning rates."""

    num_steps: int = 0
    """Optimizer steps; or give ``num_epochs``."""
    num_epochs: float = 0.0
    """Passes over the training data, rounded to whole steps; or give ``num_steps``."""
    batch_size: Positive = 32
    """Examples (sequences, for task "causal-lm") of an optimizer step, over all ranks and accumulation steps."""
    gradient_accumulation_steps: Positive = 1
    """Micro-batches whose gradients are summed for one optimizer step."""
    sequence_parallel: Positive = 1
    """Neighbouring ranks n that train on the same sequences, each on ``data.max_length`` / n tokens, for sequences too
    long for one. It must divide the ranks and the model's attention heads (docs/how-to/large-models.md)."""
    precision: Precision = "bf16"
    """What the model computes in; factors, moments and losses are kept in fp32 either way."""
    score_learning_rate: Rate | None = None
    """For A, B, R and C, and for the scores of movement pruning. None, here and below, is a rate for the model's width
    and the run's steps, of :func:`pst_ds.core.schedule.default_learning_rates`."""
    update_learning_rate: Rate | None = None
    """For U and V."""
    gate_learning_rate: Rate | None = None
    """For the gates of ``pst.update_gates``."""
    prompt_learning_rate: Rate | None = None
    """For the prompt of ``[prompt]``."""
    embedding_learning_rate: Rate | None = None
    """For U and V of ``pst.update_embeddings``."""
    head_learning_rate: Rate | None = None
    """For the modules trained in full; for every weight with the methods that train all of them."""
    score_penalty: Rate = 0.0
    """Of method "soft-movement": what the mean of sigmoid(S) costs at the final sparsity; less before it."""
    adam_beta1: Share = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Share = 0.98
    """Decay of Adam's second moment. Held-out loss was lower than with Adam's 0.999."""
    learning_rate_warmup_fraction: Share = 0.06
    """Share of all steps over which learning rates rise from zero; they then fall linearly to zero."""
    gradient_clipping: Rate = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    log_interval: Positive = 10
    """Optimizer steps between lines of metrics.jsonl; a mask update always writes one."""
    profile_steps: str = ""
    """First and last optimizer step, as "20:22", that rank 0 records with torch.profiler into profile/ of the run
    folder: where the time goes, operator by operator (docs/how-to/monitor.md). Empty is none."""
    stall_timeout_seconds: Annotated[float, Ge(0.0), Lt(1e7)] = 1800.0
    """A rank that makes no progress for so long ends the run, with its number and stack. Longer than the longest
    micro-batch, mask update and evaluation batch. 0 never does."""

    def __post_init__(self) -> None:
        in_range = self.num_steps >= 0 and 0.0 <= self.num_epochs < float("inf")
        if not in_range or (self.num_steps > 0) == (self.num_epochs > 0):
            raise ConfigError(
                f"train.num_steps = {self.num_steps} and train.num_epochs = {self.num_epochs}: set one of them to a "
                "number above 0, and the other to 0"
            )
        first, last = self.profiled
        if self.profile_steps and not 1 <= first <= last:
            raise ConfigError(
                f'train.profile_steps = {self.profile_steps!r} must be the first and the last step, such as "20:22"'
            )
        check_fields(self)

    @property
    def profiled(self) -> tuple[int, int]:
        """First and last step to record; (0, 0) for none."""
        found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", self.profile_steps)
        return (int(found[1]), int(found[2])) if found else (0, 0)
