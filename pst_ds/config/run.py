"""The run file: one TOML file into frozen dataclasses. Paths are relative to the working directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from pst_ds.config.checks import FINITE, NotNegative, Positive, Rate, Share, check_fields, require_choice
from pst_ds.config.checks import ConfigError as ConfigError
from pst_ds.config.data import DataConfig as DataConfig
from pst_ds.config.data import EvalConfig as EvalConfig
from pst_ds.config.methods import METHODS as METHODS_BY_NAME
from pst_ds.config.methods import Method
from pst_ds.config.prompt import PromptConfig as PromptConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.config.quantization import QuantizationConfig as QuantizationConfig
from pst_ds.config.sequences import groups_of_ranks, require_sequences_to_share
from pst_ds.config.start import StartConfig
from pst_ds.config.tasks import TASKS, TaskFacts, check_task
from pst_ds.config.tracking import TrackingConfig
from pst_ds.config.train import TrainConfig as TrainConfig
from pst_ds.core.patterns import parse_pattern
from pst_ds.core.schedule import (
    CubicSchedule,
    OneShotSchedule,
    Schedule,
    ScheduleConfig,
    Schedules,
    default_learning_rates,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The pretrained model."""

    path: str
    """Folder of a Hugging Face model, or its name on the hub."""
    tokenizer: str = ""
    """Folder or name of the tokenizer, when it is not the model's."""
    dropout: Share = 0.0
    """Every dropout probability of the model, in place of those in its config: small matrices under a mask underfit
    sooner than they overfit. An export has the config's again."""
    attn_implementation: str = ""
    """As in transformers: "eager", "sdpa", "flash_attention_2" or another; empty is the model's default. On a CPU
    "eager" trains short texts in bf16 faster than "sdpa"."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    gradient_checkpointing_reentrant: bool = False
    """Recompute them in torch's older, reentrant way: a backward pass inside the backward pass. Same gradients."""
    activation_offload: bool = False
    """Keep the inputs of recomputed blocks in the host's memory until the backward pass: then the activations of a
    device do not grow with the number of blocks, for a copy each way. Takes gradient_checkpointing, reentrant."""
    base_bits: Literal[16, 8, 4] = 16
    """Bits of a frozen weight of the pruned layers: 8 and 4 round them once, as the model loads, to integers that share
    scales, in shards under ZeRO-3 as the weights would be. 16 keeps them in ``train.precision``."""
    base_group: Literal[32, 64, 128, "row"] | None = None
    """Inputs of an output that share a scale of the frozen weights, which must divide those of every layer; or all of
    them. Unset, it is "row" for 8 bits and 64 for 4."""
    embedding_bits: Literal[16, 8, 4] = 16
    """The same for the frozen token embedding and a language model's output layer, tied or not, with the same groups.
    Neither exists as a whole in 16 bits once the model is loaded."""

    def __post_init__(self) -> None:
        if self.base_bits == self.embedding_bits == 16 and self.base_group is not None:
            raise ConfigError(
                f"model.base_group = {self.base_group!r} does nothing with model.base_bits = 16; set model.base_bits "
                "to 8 or 4"
            )
        if self.gradient_checkpointing_reentrant and not self.gradient_checkpointing:
            raise ConfigError(
                "model.gradient_checkpointing_reentrant = true does nothing by itself; set "
                "model.gradient_checkpointing = true too"
            )
        if self.activation_offload and not self.gradient_checkpointing_reentrant:
            raise ConfigError(
                "model.activation_offload = true moves the inputs of blocks that are recomputed reentrantly; set "
                "model.gradient_checkpointing = true and model.gradient_checkpointing_reentrant = true too"
            )
        check_fields(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints to go on from, with ``pst-ds train RUN --resume``."""

    interval: NotNegative = 100
    """Optimizer steps between checkpoints; 0 saves only the best, the last, and when a signal asks for it."""
    keep_last: Positive = 2
    """Newest checkpoints to keep, besides the best one and the last."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturesConfig:
    """Figures of every layer and pictures of some, for TensorBoard and layers.jsonl (docs/how-to/monitor.md)."""

    interval: int = 0
    """Optimizer steps between two; 0 is about 20 times in the run, -1 never. The last step always has one."""
    layers: tuple[str, ...] = ()
    """Layers with a histogram of scores and a picture of the mask, each by name or dotted ending; empty is the first,
    the middle and the last pruned one."""

    def __post_init__(self) -> None:
        if self.interval < -1:
            raise ConfigError(f"pictures.interval = {self.interval} must be a number of steps, 0 or -1")

    def last_before(self, step: int, num_steps: int) -> int:
        """Return the last step before ``step`` that has pictures; -1 for none."""
        return (step - 1) // self._interval(num_steps) * self._interval(num_steps) if step else -1

    def is_due(self, step: int, num_steps: int) -> bool:
        """Return whether a run of ``num_steps`` draws pictures after ``step`` (0 is before the first)."""
        return self.interval >= 0 and (step % self._interval(num_steps) == 0 or step == num_steps)

    def _interval(self, num_steps: int) -> int:
        return self.interval or max(1, num_steps // 20)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """Learning from a dense teacher's predictions besides the labels (arXiv 1503.02531)."""

    weight: Annotated[float, Ge(0.0), Le(1.0)] = 0.0
    """Share of the loss that is KL(teacher || student) of the predictions; the rest is the task's own. 0 has no
    teacher."""
    hidden_states: Rate = 0.0
    """Weight of the relative squared distance of the hidden states after each block, besides the divergence of the
    predictions (arXiv 2310.06927)."""
    temperature: Annotated[float, Gt(0.0), FINITE] = 1.0
    """Both logits are divided by it; the divergence is multiplied by its square."""
    teacher: str = ""
    """Folder of a model of the same task, classes and vocabulary. Empty is the model itself without masks and updates:
    it costs no memory, and takes that nothing but the small matrices trains and that the base is dense."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("teacher", "hidden_states"):
            if getattr(self, name) and not self.weight:
                raise ConfigError(
                    f"distillation.{name} = {getattr(self, name)!r} does nothing with distillation.weight = 0; set a "
                    "weight"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole run."""

    output_dir: str
    """The run folder: the resolved run file, metrics and checkpoints."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    task: str = "classification"
    """What the model learns; docs/how-to/data.md says what data each task takes."""
    method: str = "pst"
    """What is pruned and what trains; docs/how-to/methods.md says what each method is for."""
    seed: int = 0
    """Seed of the batches' order, dropout, a new head and, unless ``pst.seed`` is set, the factors."""
    deepspeed_config: str = ""
    """DeepSpeed's JSON; empty runs one process without DeepSpeed."""
    dense_run: str = ""
    """Run folder of a dense run (method "dense" or "lora") of the same base, data and batch size. Its losses are shown
    with those of this run, and it is judged by them."""
    pst: PSTConfig = field(default_factory=PSTConfig)
    start: StartConfig = field(default_factory=StartConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ConfigError("output_dir = '' is empty: name the folder that the run writes to")
        require_choice("task", self.task, TASKS)
        require_choice("method", self.method, METHODS_BY_NAME)
        check_task(self.task, self.data, self.eval, self.train.num_steps)
        self._require_method_fits()
        self._mask_schedule(1)  # refuse bad numbers now
        self._require_reachable_sparsity()
        self.start.require_fit(self)
        self.quantization.require_fit(self.method, self.schedule)
        self._require_frozen_base()
        require_sequences_to_share(self)
        self.prompt.require_fit(self)

    def _require_method_fits(self) -> None:
        masks = self.mask_method.masks
        if self.pst.initial_mask == "zeros" and masks != "fixed":
            fixed = ", ".join(repr(name) for name, method in METHODS_BY_NAME.items() if method.masks == "fixed")
            raise ConfigError(
                f'pst.initial_mask = "zeros" is for methods with a fixed mask ({fixed}), not for method = '
                f"{self.method!r}; leave it out"
            )
        if bool(self.mask_method.score_penalty) != (self.train.score_penalty > 0.0):
            penalised = " and ".join(f'"{name}"' for name, method in METHODS_BY_NAME.items() if method.score_penalty)
            raise ConfigError(
                f"train.score_penalty = {self.train.score_penalty} with method = {self.method!r}: method "
                f"{penalised} needs one above 0, and no other method has one"
            )
        try:
            injected = self.mask_method.pst_config(self.pst)
        except ValueError as error:
            raise ConfigError(f"method = {self.method!r}: pst.{error}") from None
        if self.pst.multiplicative_update and masks != "fixed":
            raise ConfigError(
                f'pst.multiplicative_update = true is for fixed masks, not for method = {self.method!r}; use "spp"'
            )
        if masks != "none":
            self._require_ranking(injected)

    def _require_frozen_base(self) -> None:
        """Refuse few bits for weights that train."""
        injected, method = self.mask_method.pst_config(self.pst), self.mask_method
        trains = method.trains_everything or injected.train_weights or injected.full_scores
        few = {"base_bits": trains, "embedding_bits": method.trains_everything}
        for key in [key for key, trained in few.items() if trained and getattr(self.model, key) != 16]:
            frozen = ", ".join(repr(name) for name, other in METHODS_BY_NAME.items() if not other.trains_everything)
            raise ConfigError(
                f"model.{key} = {getattr(self.model, key)} rounds frozen weights once, and method = {self.method!r} "
                f"trains every weight; take one of {frozen}, or model.{key} = 16"
            )

    def _require_ranking(self, injected: PSTConfig) -> None:
        """Refuse masks that the order of the weights in memory would decide, for want of scores that differ."""
        from_zeros, masks = self.pst.initial_mask == "zeros", self.mask_method.masks
        if self.pst.magnitude == "activation" and (from_zeros or injected.full_scores):
            what = 'pst.initial_mask = "zeros"' if from_zeros else f"method = {self.method!r}"
            raise ConfigError(
                f'pst.magnitude = "activation" is another way to rank by |W|, which {what} does not do; leave it out'
            )
        if injected.scores_stay_equal and not from_zeros:
            raise ConfigError(
                f"pst.magnitude = {self.pst.magnitude!r} leaves method = {self.method!r} nothing to rank weights by; "
                'set pst.magnitude = "weight" or "activation", or keep scores that train'
            )
        if masks != "ramp" or not injected.scores_start_equal:
            return
        without = "" if injected.full_scores else f" with pst.magnitude = {self.pst.magnitude!r}"
        begin = f"all scores of method = {self.method!r}{without} are equal at first"
        if self.schedule.initial_sparsity > 0.0:
            raise ConfigError(
                f"schedule.initial_sparsity = {self.schedule.initial_sparsity}, but {begin}, and nothing says which "
                "weights to prune before the first step. Fix: schedule.initial_sparsity = 0"
            )
        if self.train.score_learning_rate == 0.0:
            raise ConfigError(
                f"train.score_learning_rate = {self.train.score_learning_rate}, but {begin}, and would stay so; set it "
                "above 0"
            )

    def _require_reachable_sparsity(self) -> None:
        asked, pattern = self.schedule.final_sparsity, parse_pattern(self.pst.pattern)
        rules = self.mask_method.pst_config(self.pst).rules
        if pattern.fixed_sparsity not in (None, asked):
            raise ConfigError(
                f'schedule.final_sparsity = {asked}, but pst.pattern = "{pattern}" has {pattern.fixed_sparsity} zeros. '
                f"Fix: schedule.final_sparsity = {pattern.fixed_sparsity}"
            )
        for rule in rules:
            own = rule.final_sparsity
            where, share = ("schedule", asked) if own is None else ("overrides", own)
            if rule.pattern.pools_matrices and self.pst.min_kept_share > 1.0 - share:
                raise ConfigError(
                    f'pst.min_kept_share = {self.pst.min_kept_share} of every matrix of pattern "{rule.pattern}" '
                    f"(method = {self.method!r}) is more than {where}.final_sparsity = {share} keeps in all. Fix: "
                    f"pst.min_kept_share below {1.0 - share:.4g}"
                )

    @property
    def task_facts(self) -> TaskFacts:
        """Facts about the task, known without its code."""
        return TASKS[self.task]

    @property
    def mask_method(self) -> Method:
        """Facts about the method."""
        return METHODS_BY_NAME[self.method]

    @property
    def seeded_pst(self) -> PSTConfig:
        """``pst`` with a seed: its own, or else the run's."""
        return replace(self.pst, seed=self.seed) if self.pst.seed is None else self.pst

    @property
    def ranks_by_activation(self) -> bool:
        """True if masks are chosen by |W| times the norms of the inputs."""
        return self.mask_method.masks != "none" and self.pst.magnitude == "activation"

    @property
    def metric(self) -> str:
        """Name of the metric that chooses the best checkpoint."""
        return self.eval.metric or self.task_facts.metrics[0]

    @property
    def eval_batch_size(self) -> int:
        """Examples a rank evaluates at a time."""
        return self.eval.batch_size or self.task_facts.eval_batch_size

    def make_schedules(self, num_steps: int) -> Schedules:
        """Return when a run of ``num_steps`` changes its masks, quantisation scales and update ranks.

        Raises ConfigError for numbers that do not fit together, or weights that would be quantised too late.
        """
        masks = self._mask_schedule(num_steps)
        rounding = self.quantization.make_schedule(masks, num_steps)
        return Schedules(masks, rounding, self._rank_budget(num_steps))

    def _mask_schedule(self, num_steps: int) -> Schedule | None:
        """Return the sparsity schedule; None for the dense methods."""
        masks = self.mask_method.masks
        if masks == "none":
            return None
        try:
            if masks == "fixed":
                return OneShotSchedule(self.schedule.final_sparsity)
            return CubicSchedule(num_steps=num_steps, **asdict(self.schedule))
        except ValueError as error:
            raise ConfigError(f"schedule.{error}") from None

    def _rank_budget(self, num_steps: int) -> Schedule | None:
        """Return the schedule of the share of the updates' components that is dropped, along the ramp of
        ``[schedule]`` with any method; None for a run that keeps them all."""
        dropped_share = self.mask_method.pst_config(self.pst).dropped_share if self.mask_method.injects else 0.0
        if not dropped_share:
            return None
        ramp = replace(self.schedule, final_sparsity=dropped_share, initial_sparsity=0.0)
        return CubicSchedule(num_steps=num_steps, **asdict(ramp))

    def num_steps(self, num_examples: int) -> int:
        """Return the run's optimizer steps for ``num_examples`` to train on; ConfigError for less than a batch."""
        if num_examples < self.train.batch_size:
            raise ConfigError(
                f"data.train has {num_examples} examples, fewer than one batch of train.batch_size = "
                f"{self.train.batch_size}; lower it"
                + (" or data.max_length, the tokens of an example" if self.task_facts.packs_text else "")
            )
        if self.train.num_steps:
            return self.train.num_steps
        return max(1, round(self.train.num_epochs * (num_examples // self.train.batch_size)))

    def with_rates(self, *, width: int, num_steps: int, num_examples: int, num_labels: int) -> RunConfig:
        """Return the run with a number for every learning rate, for a model of hidden size ``width`` and labels of
        ``num_labels`` different values, 0 without labels."""
        epochs = num_steps * self.train.batch_size / num_examples
        default = default_learning_rates(
            width=width, num_steps=num_steps, epochs=epochs, num_labels=num_labels,
            predicts_tokens=self.task_facts.predicts_tokens,
        )  # fmt: skip
        multiplies = self.mask_method.pst_config(self.pst).multiplicative_update
        rates = {
            "score_learning_rate": default.scores,
            "update_learning_rate": default.multiplicative if multiplies else default.updates,
            "gate_learning_rate": default.gates,
            "prompt_learning_rate": default.prompt,
            "embedding_learning_rate": default.embeddings,
            "head_learning_rate": default.everything if self.mask_method.trains_everything else default.head,
        }
        unset: dict[str, Any] = {name: rate for name, rate in rates.items() if getattr(self.train, name) is None}
        return replace(self, train=replace(self.train, **unset))

    def micro_batch_size(self, world_size: int) -> int:
        """Return the most examples that a rank takes at a time, together with those that it shares sequences with; some
        take one less where the batch does not divide. Raises ConfigError when ranks cannot be grouped, or when some
        would have no example."""
        degree = self.train.sequence_parallel
        groups = groups_of_ranks(degree, world_size)
        shares = groups * self.train.gradient_accumulation_steps
        if self.train.batch_size < shares:
            raise ConfigError(
                f"train.batch_size = {self.train.batch_size} is less than an example for each of {groups} "
                f"{'ranks' if degree == 1 else f'groups of {degree} ranks'} x "
                f"{self.train.gradient_accumulation_steps} accumulation steps; make it {shares} or more, or take fewer "
                "ranks"
            )
        return -(-self.train.batch_size // shares)
