"""Settings of training and its loss: ``[train]``, ``[finetune]`` and ``[distillation]``."""

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from pst_ds.config.methods import METHODS
from pst_ds.config.settings import (
    FINITE,
    ConfigError,
    Integers,
    MayDiffer,
    Positive,
    Rate,
    Reported,
    Section,
    Share,
    settings,
)
from pst_ds.config.tasks import TASKS

RATES = tuple(f"{group}_learning_rate" for group in ("score", "update", "embedding", "head"))
"""Learning rates in ``[train]``."""


@settings
class DistillationConfig(Section):
    """Knowledge distillation from a dense teacher, in addition to the labels (arXiv 1503.02531)."""

    weight: Annotated[float, Ge(0.0), Le(1.0)] = 0.0
    """Weight of the KL divergence between teacher and student predictions in the loss; the task's loss has the rest. 0
    switches distillation off."""
    temperature: Annotated[float, Gt(0.0), FINITE] = 1.0
    """Divisor of both logits; the divergence is multiplied by its square."""
    teacher: str = ""
    """Model folder with the same task, classes and vocabulary. Empty uses the base model without masks and updates,
    which needs no memory but requires a dense base, and that only the small factors train. "finetuned" is the result of
    ``[finetune]``."""

    def problems(self) -> Iterator[str]:
        if not self.weight:
            yield from self.unused("distillation", "with distillation.weight = 0", "set distillation.weight", "teacher")

    def conflicts(self, task: str) -> Iterator[str]:
        """Yield a message for a task without predictions to compare."""
        if self.weight and TASKS[task].no_teacher:
            yield (
                f"distillation.weight = {self.weight} compares classes or tokens, and task = {task!r} "
                f"{TASKS[task].no_teacher}. Set distillation.weight = 0"
            )


@settings
class TrainConfig(Section):
    """Steps, batches and learning rates."""

    num_steps: int = 0
    """Optimizer steps. Set either this or ``num_epochs``."""
    num_epochs: float = 0.0
    """Epochs over the training data, rounded to whole steps. Set either this or ``num_steps``."""
    batch_size: Positive = 32
    """Examples (sequences, for task "causal-lm") per optimizer step, over all ranks and accumulation steps."""
    gradient_accumulation_steps: MayDiffer[Positive] = 1
    """Micro-batches per optimizer step, whose gradients are summed."""
    sequence_parallel: MayDiffer[Positive] = 1
    """Neighbouring ranks n that share the same sequences, each with ``data.max_length`` / n tokens, for sequences that
    are too long for one rank. Must divide the number of ranks and of attention heads (docs/how-to/large-models.md)."""
    expert_parallel: MayDiffer[Positive] = 1
    """Neighbouring ranks n that divide the experts of a mixture among them, so that tokens travel instead of weights.
    Must divide the number of ranks and of experts; a single process has all experts (docs/how-to/large-models.md)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the model's computations. Factors, Adam's moments and losses are always fp32."""
    score_learning_rate: Reported[Rate | None] = None
    """Learning rate of A, B, R and C. Unset learning rates, here and below, are chosen by the model's width and the
    run's steps (:func:`pst_ds.core.schedule.default_learning_rates`)."""
    update_learning_rate: Reported[Rate | None] = None
    """Learning rate of U and V."""
    embedding_learning_rate: Reported[Rate | None] = None
    """Learning rate of U and V of ``pst.update_embeddings``."""
    head_learning_rate: Reported[Rate | None] = None
    """Learning rate of modules trained in full, and of every weight for methods that train all of them."""
    adam_beta1: Share = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Share = 0.98
    """Decay of Adam's second moment. Held-out loss was lower than with the usual 0.999."""
    learning_rate_warmup_fraction: Share = 0.06
    """Fraction of all steps over which learning rates increase from zero; they then decrease linearly to zero."""
    gradient_clipping: Reported[Rate] = 1.0
    """Maximum global gradient norm; 0 switches clipping off."""
    log_interval: MayDiffer[Positive] = 10
    """Optimizer steps between lines of metrics.jsonl; every mask update also writes one."""
    stall_timeout_seconds: MayDiffer[Annotated[float, Ge(0.0), Lt(1e7)]] = 1800.0
    """Seconds without progress on a rank after which the run ends with that rank's number and stack. Set it above the
    longest micro-batch, mask update and evaluation batch. 0 never ends a run."""
    profile: MayDiffer[Integers] = ()
    """First and last of the optimizer steps that every rank profiles (docs/how-to/monitor.md), such as ``[11, 13]``."""

    def problems(self) -> Iterator[str]:
        # Checked here, because a negative number of one would be hidden by the other, and NaN compares as false.
        in_range = self.num_steps >= 0 and 0.0 <= self.num_epochs < float("inf")
        if not in_range or (self.num_steps > 0) == (self.num_epochs > 0):
            yield (
                f"train.num_steps = {self.num_steps} and train.num_epochs = {self.num_epochs}: set one of them to a "
                "number above 0, and the other to 0"
            )
        yield from self.problems_of_profile(self.num_steps)

    def problems_of_profile(self, num_steps: int) -> Iterator[str]:
        """Yield a message if ``profile`` does not name steps of a run of ``num_steps``; 0 if these are not known."""
        if not self.profile:
            return
        is_range = len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]
        if not is_range or (num_steps > 0 and self.profile[1] > num_steps):
            of_run = f" of the {num_steps}" if num_steps > 0 else ""
            yield (
                f"train.profile = {list(self.profile)} must be the first and the last{of_run} steps to profile, "
                f"counted from 1. Set two such numbers, such as [1, {min(3, num_steps) or 3}], or remove it"
            )

    def conflicts(
        self, task: str, max_length: int, distillation: DistillationConfig, deepspeed_config: str
    ) -> Iterator[str]:
        """Yield why ranks cannot share the sequences of a run, if ``sequence_parallel`` asks them to."""
        if self.sequence_parallel == 1:
            return
        lead = f"train.sequence_parallel = {self.sequence_parallel}"
        facts = TASKS[task]
        if not facts.predicts_tokens:
            yield f"{lead} is for language models, not for task = {task!r}. Set train.sequence_parallel = 1"
            return
        if not deepspeed_config:
            yield f'{lead} requires ZeRO-3. Set deepspeed_config = "ds_configs/zero3.json"'
        if remainder := max_length % self.sequence_parallel:
            divisible = max_length - remainder or self.sequence_parallel  # 0 is not a length
            yield f"{lead} must divide data.max_length = {max_length}. Set data.max_length = {divisible}"
        if distillation.teacher:
            yield (
                f"{lead} does not support distillation.teacher = {distillation.teacher!r}. Remove it to distil from "
                "the base model"
            )

    def experts_divided_by(self, world_size: int) -> int:
        """Return the number of ranks that divide the experts of a mixture; a single process has them all."""
        if world_size == 1:
            return 1
        return self.expert_parallel

    def groups_of_ranks(self, world_size: int) -> int:
        """Return the number of groups of ranks that share sequences. Raises ConfigError if ranks cannot be grouped."""
        # A single process has all experts, so `expert_parallel` always fits it. It cannot share a sequence, though.
        sizes = {"sequence_parallel": self.sequence_parallel, "expert_parallel": self.experts_divided_by(world_size)}
        for name, size in sizes.items():
            if world_size % size:
                raise ConfigError(
                    f"train.{name} = {size} does not divide {world_size} ranks. Start a multiple of {size}, or set a "
                    "divisor"
                )
        return world_size // self.sequence_parallel


@settings
class FinetuneConfig(Section):
    """Training of the whole model before it is pruned, on the run's data (docs/how-to/methods.md)."""

    method: str = "none"
    """Method without masks, such as "lora" or "dense". Its run folder is ``finetuned/`` in that of the run, and
    ``finetuned/model`` becomes the base model. "none" omits this stage."""
    num_steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps. Set either this or ``num_epochs``."""
    num_epochs: Rate = 0.0
    """Epochs over the training data. Set either this or ``num_steps``."""
    update_learning_rate: Rate | None = None
    """Learning rate of U and V. Unset rates, here and below, are those that ``[train]`` would have."""
    embedding_learning_rate: Rate | None = None
    """Learning rate of U and V of ``pst.update_embeddings``."""
    head_learning_rate: Rate | None = None
    """Learning rate of modules trained in full, and of every weight with method "dense"."""

    def problems(self) -> Iterator[str]:
        # A model that is already pruned could not be pruned once more by the run itself.
        names = [name for name, method in METHODS.items() if method.masks == "none"]
        if self.method == "none":
            others = (name for name in vars(self) if name != "method")
            instead = 'set finetune.method, such as "lora"'
            yield from self.unused("finetune", 'with finetune.method = "none"', instead, *others)
        elif self.method not in names:
            yield f"finetune.method = {self.method!r} must be one of {', '.join(map(repr, ['none', *names]))}"
        elif (self.num_steps > 0) == (self.num_epochs > 0):
            yield (
                f"finetune.num_steps = {self.num_steps} and finetune.num_epochs = {self.num_epochs}: set one of them "
                "above 0, and the other to 0"
            )
