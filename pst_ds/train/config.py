"""The run file: one TOML file into frozen dataclasses. Paths are relative to the working directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pst_ds.core.patterns import parse_pattern
from pst_ds.core.schedule import CubicSchedule, OneShotSchedule, Schedule
from pst_ds.errors import InputError
from pst_ds.nn.config import PSTConfig

Method = Literal["pst", "magnitude", "dense"]
Precision = Literal["bf16", "fp32"]
TaskName = Literal["classification", "causal-lm"]
METRICS: dict[TaskName, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "matthews_correlation"),
    "causal-lm": ("perplexity",),
}
"""What may choose the best checkpoint of a task; the first does if nothing else is asked for."""
_EVAL_BATCH_SIZES: dict[TaskName, int] = {"classification": 64, "causal-lm": 8}


class ConfigError(InputError):
    """A run file, or a --set, that cannot be used: the key, its value and the fix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The pretrained model."""

    path: str
    """Folder of a Hugging Face model, or its name on the hub."""
    tokenizer: str = ""
    """Folder or name of the tokenizer, when it is not the model's."""
    dropout: float | None = None
    """Overrides every dropout probability of the model's config; None leaves them."""
    attn_implementation: str = ""
    """As in transformers: "eager", "sdpa", "flash_attention_2" or another; empty is the model's default. On a CPU
    "eager" trains short texts in bf16 faster than "sdpa"."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    gradient_checkpointing_reentrant: bool = False
    """Recompute them in torch's older, reentrant way: a backward pass inside the backward pass. Same gradients."""

    def __post_init__(self) -> None:
        if self.gradient_checkpointing_reentrant and not self.gradient_checkpointing:
            raise ConfigError(
                "model.gradient_checkpointing_reentrant = true does nothing by itself; set "
                "model.gradient_checkpointing = true too"
            )
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"model.dropout = {self.dropout} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the texts are, and how long the model's inputs."""

    train: str = ""
    """Local JSONL, CSV, Parquet or text file to train on."""
    validation: str = ""
    """Local file for periodic evaluation and the choice of the best checkpoint."""
    test: str = ""
    """Local file that only ``pst-ds eval`` and ``verify`` read."""
    dataset: str = ""
    """Name of a dataset on the hub instead of local files; the three settings above then name its splits."""
    subset: str = ""
    """Configuration of the hub dataset, such as "sst2" of "glue"."""
    text_columns: tuple[str, ...] = ("text",)
    """One column, or two for sentence pairs; task "causal-lm" takes one."""
    label_column: str = "label"
    """The class of a row; task "causal-lm" has none."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """What a row of a .txt file is, as in ``datasets``: a line, what stands between empty lines, or the whole file. Its
    column is "text"."""
    max_length: int = 128
    """Tokens a text is cut to. For task "causal-lm" the length of every training sequence: the documents, with the
    end-of-text token between them, are one stream that is cut into such sequences; what is left at the end, less than a
    sequence, is not trained on. Positions and attention do not start anew at a document. An evaluation predicts every
    token but the first once: there a sequence begins with the last token of the one before, and the last is shorter."""
    group_by_length: bool = False
    """Make batches of texts of similar length; less padding, the same examples in another order."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("data.train is missing: name a local file, or a split of data.dataset")
        if len(self.text_columns) not in (1, 2):
            raise ConfigError(f"data.text_columns = {list(self.text_columns)} must name one column or two")
        _positive("data.max_length", self.max_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """How sparse, and when."""

    final_sparsity: float = 0.9
    """Fraction of zeros at the end, in [0, 1)."""
    initial_sparsity: float = 0.0
    """Fraction of zeros until the ramp starts."""
    warmup_fraction: float = 0.1
    """Share of all steps before the ramp."""
    cooldown_fraction: float = 0.3
    """Share of all steps after the ramp, with fixed masks."""
    update_interval: int = 1
    """Optimizer steps between mask updates."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Steps, batches and learning rates."""

    num_steps: int = 0
    """Optimizer steps; or give ``num_epochs``."""
    num_epochs: float = 0.0
    batch_size: int = 32
    """Examples (sequences, for task "causal-lm") of an optimizer step, over all ranks and accumulation steps."""
    gradient_accumulation_steps: int = 1
    precision: Precision = "bf16"
    score_learning_rate: float = 1e-2
    """For A, B, R and C."""
    update_learning_rate: float = 1e-3
    """For U and V."""
    embedding_learning_rate: float = 2e-4
    """For U and V of ``pst.update_embeddings``."""
    head_learning_rate: float = 5e-4
    """For the modules trained in full; for every weight with method "dense" or "magnitude"."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.98
    """Decay of Adam's second moment. Shorter than Adam's 0.999: held-out loss was lower (docs/design.md)."""
    learning_rate_warmup_fraction: float = 0.06
    """Share of all steps over which learning rates rise from zero; they then fall linearly to zero."""
    gradient_clipping: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    log_interval: int = 10
    """Optimizer steps between lines of metrics.jsonl; a mask update always writes one."""
    stall_timeout_seconds: float = 1800.0
    """A rank that makes no progress for so long ends the run, with its number and stack. Longer than the longest
    micro-batch, mask update and evaluation batch. 0 never does."""

    def __post_init__(self) -> None:
        in_range = self.num_steps >= 0 and 0.0 <= self.num_epochs < float("inf")
        if not in_range or (self.num_steps > 0) == (self.num_epochs > 0):
            raise ConfigError(
                f"train.num_steps = {self.num_steps} and train.num_epochs = {self.num_epochs}: set exactly one of them "
                "to a number above 0"
            )
        for name in ("batch_size", "gradient_accumulation_steps", "log_interval"):
            _positive(f"train.{name}", getattr(self, name))
        rates = ("score_learning_rate", "update_learning_rate", "embedding_learning_rate", "head_learning_rate")
        for name in (*rates, "gradient_clipping"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"train.{name} = {getattr(self, name)} must be a finite number of at least 0")
        if not 0.0 <= self.stall_timeout_seconds < 1e7:  # what a timer can hold
            raise ConfigError(f"train.stall_timeout_seconds = {self.stall_timeout_seconds} must be in [0, 1e7)")
        for name in ("adam_beta1", "adam_beta2", "learning_rate_warmup_fraction"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"train.{name} = {getattr(self, name)} must be in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluation on the validation file."""

    interval: int = 0
    """Optimizer steps between evaluations; 0 evaluates at the end only."""
    batch_size: int = 0
    """Examples a rank evaluates at a time. 0 is 64, and 8 for task "causal-lm", where each has logits of max_length x
    vocabulary."""
    metric: Literal["", "accuracy", "macro_f1", "matthews_correlation", "perplexity"] = ""
    """Chooses the best checkpoint, among those at the final sparsity; empty is "accuracy", or for task "causal-lm" the
    lowest "perplexity"."""

    def __post_init__(self) -> None:
        for name in ("interval", "batch_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"eval.{name} = {getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints to go on from, with ``pst-ds train RUN --resume``."""

    interval: int = 100
    """Optimizer steps between checkpoints; 0 saves only the best, the last, and when a signal asks for it."""
    keep_last: int = 2
    """Newest checkpoints to keep, beside the best one and the last."""

    def __post_init__(self) -> None:
        if self.interval < 0:
            raise ConfigError(f"checkpoint.interval = {self.interval} must not be negative")
        _positive("checkpoint.keep_last", self.keep_last)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run."""

    output_dir: str
    """The run folder: the resolved run file, metrics and checkpoints."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    task: TaskName = "classification"
    """"classification" of a text or a pair, with a new head; "causal-lm" trains a language model on text, with the head
    it has."""
    method: Method = "pst"
    """"pst"; "dense" trains every weight; "magnitude" prunes once by |W0| and trains every weight under the mask."""
    seed: int = 0
    deepspeed_config: str = ""
    """DeepSpeed's JSON; empty runs one process without DeepSpeed."""
    pst: PSTConfig = field(default_factory=PSTConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ConfigError("output_dir is missing: name the folder that the run writes to")
        if self.eval.metric and self.eval.metric not in METRICS[self.task]:
            raise ConfigError(
                f"eval.metric = {self.eval.metric!r} is not a metric of task {self.task!r}; choose from "
                f"{', '.join(map(repr, METRICS[self.task]))}, or leave it out"
            )
        if self.task == "causal-lm" and len(self.data.text_columns) != 1:
            raise ConfigError(
                f"data.text_columns = {list(self.data.text_columns)} must name one column for task 'causal-lm'"
            )
        if self.task == "causal-lm" and self.data.max_length < 2:
            raise ConfigError(f"data.max_length = {self.data.max_length} must be at least 2 for task 'causal-lm'")
        self.make_schedule(1)  # refuses bad numbers now
        self._require_reachable_sparsity()

    def _require_reachable_sparsity(self) -> None:
        asked, pattern = self.schedule.final_sparsity, parse_pattern(self.pst.pattern)
        if pattern.fixed_sparsity not in (None, asked):
            raise ConfigError(
                f'schedule.final_sparsity = {asked}, but pst.pattern = "{pattern}" has {pattern.fixed_sparsity} zeros. '
                f"Fix: schedule.final_sparsity = {pattern.fixed_sparsity}"
            )
        if pattern.kind == "global" and self.pst.min_kept_share > 1.0 - asked:
            raise ConfigError(
                f"pst.min_kept_share = {self.pst.min_kept_share} of every matrix is more than schedule.final_sparsity "
                f"= {asked} keeps in all. Fix: pst.min_kept_share below {1.0 - asked:.4g}"
            )

    @property
    def metric(self) -> str:
        """What chooses the best checkpoint."""
        return self.eval.metric or METRICS[self.task][0]

    @property
    def eval_batch_size(self) -> int:
        """Examples a rank evaluates at a time."""
        return self.eval.batch_size or _EVAL_BATCH_SIZES[self.task]

    def make_schedule(self, num_steps: int) -> Schedule | None:
        """The sparsity schedule of a run of ``num_steps``; None for the dense method."""
        if self.method == "dense":
            return None
        try:
            if self.method == "magnitude":
                return OneShotSchedule(self.schedule.final_sparsity)
            return CubicSchedule(
                num_steps=num_steps,
                final_sparsity=self.schedule.final_sparsity,
                initial_sparsity=self.schedule.initial_sparsity,
                warmup_fraction=self.schedule.warmup_fraction,
                cooldown_fraction=self.schedule.cooldown_fraction,
                update_interval=self.schedule.update_interval,
            )
        except ValueError as error:
            raise ConfigError(f"schedule.{error}") from None

    def num_steps(self, num_examples: int) -> int:
        """Optimizer steps of the run, for ``num_examples`` in the training file; ConfigError for less than a batch."""
        if num_examples < self.train.batch_size:
            raise ConfigError(
                f"data.train has {num_examples} examples, fewer than one batch of train.batch_size = "
                f"{self.train.batch_size}; lower it"
                + (" or data.max_length, the tokens of an example" if self.task == "causal-lm" else "")
            )
        if self.train.num_steps:
            return self.train.num_steps
        return max(1, round(self.train.num_epochs * (num_examples // self.train.batch_size)))

    def micro_batch_size(self, world_size: int) -> int:
        """Examples a rank takes at a time. Raises ConfigError when the batch cannot be shared out evenly."""
        shares = world_size * self.train.gradient_accumulation_steps
        if self.train.batch_size % shares:
            raise ConfigError(
                f"train.batch_size = {self.train.batch_size} cannot be shared evenly by {world_size} ranks x "
                f"{self.train.gradient_accumulation_steps} accumulation steps; make it a multiple of {shares}"
            )
        return self.train.batch_size // shares


def _positive(name: str, value: Any) -> None:
    if value < 1:
        raise ConfigError(f"{name} = {value} must be at least 1")
