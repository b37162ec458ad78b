"""The settings of a run, :class:`RunConfig`, and of what it writes. Paths are relative to the working directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from pst_ds.config.additions import Additions, conflicts_of
from pst_ds.config.data import DataConfig as DataConfig
from pst_ds.config.data import EvalConfig
from pst_ds.config.methods import METHODS, Method, method_conflicts
from pst_ds.config.model import ModelConfig, QuantizationConfig
from pst_ds.config.one_shot import OneShotConfig
from pst_ds.config.pst import PSTConfig
from pst_ds.config.settings import ConfigError as ConfigError
from pst_ds.config.settings import Interval, MayDiffer, NotNegative, Positive, Section, Strings, settings
from pst_ds.config.tasks import TASKS, TaskFacts, task_conflicts
from pst_ds.config.train import DistillationConfig, FinetuneConfig, TrainConfig
from pst_ds.config.update_forms import LOW_RANK, only_low_rank, update_form
from pst_ds.core.patterns import parse_pattern
from pst_ds.core.schedule import (
    CubicSchedule,
    OneShotSchedule,
    Schedule,
    ScheduleConfig,
    Schedules,
    default_learning_rates,
)
from pst_ds.file_names import FINETUNED, MODEL, START

# A solve gives all kept weights new values, and the next one needs gradients of a model that has adapted to them.
LEAST_STEPS_OF_SOLVE = 4
"""Optimizer steps from one solve to the next, at least."""
TRACKERS = ("wandb", "mlflow", "trackio")
_OF_UPDATES = (
    "target_modules", "exclude_modules", "prune_uncalled", "modules_to_save", "fused_modules", "update_rank",
    "expert_rank", "update_embeddings", "beta", "tile_bytes", "seed",
)  # fmt: skip
"""Settings of ``[pst]`` that the methods of ``[finetune]`` have too."""


@settings
class CheckpointConfig(Section):
    """Checkpoints to resume from, with ``pst-ds train RUN --resume``."""

    interval: MayDiffer[NotNegative] = 100
    """Optimizer steps between checkpoints; 0 saves only the best, the last, and on a signal."""
    keep_last: MayDiffer[Positive] = 2
    """Number of newest checkpoints to keep, in addition to the best and the last."""
    mirror: MayDiffer[str] = ""
    """Address of a folder to which each checkpoint is copied in the background, such as "s3://bucket/run" or a path on
    another disk. ``--resume`` continues from it if the run folder has no checkpoint or an older one."""

    def inside(self, name: str) -> CheckpointConfig:
        """Return the settings of a run inside the run's folder."""
        if not self.mirror:
            return self
        # A mirror has the layout of a run folder, in which two runs would overwrite each other's checkpoints.
        return replace(self, mirror=f"{self.mirror.rstrip('/')}/{name}")


@settings
class LayerStatisticsConfig(Section):
    """Statistics of all layers, for TensorBoard and layers.jsonl (docs/how-to/monitor.md)."""

    interval: MayDiffer[Interval] = 0
    """Optimizer steps between statistics; 0 is about 20 times per run, -1 never. The last step always has one."""

    def last_before(self, step: int, num_steps: int) -> int:
        """Return the last step before ``step`` after which a run that measures layers does so; -1 for none."""
        if not step:
            return -1
        interval = self._interval(num_steps)
        return (step - 1) // interval * interval

    def is_due(self, step: int, num_steps: int) -> bool:
        """Return whether a run of ``num_steps`` measures layers after ``step`` (0 is before the first)."""
        return self.interval >= 0 and (step % self._interval(num_steps) == 0 or step == num_steps)

    def _interval(self, num_steps: int) -> int:
        return self.interval or max(1, num_steps // 20)


@settings
class TrackingConfig(Section):
    """Experiment trackers, in addition to TensorBoard and metrics.jsonl (docs/how-to/monitor.md)."""

    to: MayDiffer[Strings] = ()
    """Any of "wandb", "mlflow" and "trackio". Each reads its address and offline mode from the environment."""
    project: MayDiffer[str] = "pst-ds"
    """Project in W&B and trackio, experiment in MLflow."""
    name: MayDiffer[str] = ""
    """Name of the run in the trackers; empty is the last part of output_dir."""

    def problems(self) -> Iterator[str]:
        # Of a tracker that is named twice, two would start, and only one would be closed.
        unknown = sorted(set(self.to) - set(TRACKERS))
        if unknown or len(set(self.to)) != len(self.to):
            yield f"tracking.to = {list(self.to)} must be different names among {', '.join(map(repr, TRACKERS))}"
        if self.to and not self.project:
            yield 'tracking.project = "" must be a name'

    def require_installed(self) -> None:
        """Raise ConfigError for a tracker whose package is not installed.

        Only a run that starts asks for them: reading a run folder elsewhere must not need its trackers.
        """
        missing = [name for name in self.to if find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"tracking.to names {' and '.join(missing)}, which is not installed. Run pip install 'pst-ds[trackers]'"
            )


@settings
class RunConfig(Section):
    """The settings of a run."""

    output_dir: MayDiffer[str]
    """Run folder, with the resolved run file, metrics and checkpoints."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    task: str = "classification"
    """Task that the model learns; docs/how-to/data.md lists the data that each task needs."""
    method: str = "pst"
    """Training method; docs/how-to/methods.md compares them."""
    seed: int = 0
    """Random seed of the order of batches, dropout, a new head and, unless ``pst.seed`` is set, the factors."""
    deepspeed_config: MayDiffer[str] = ""
    """DeepSpeed's JSON config; empty runs one process without DeepSpeed."""
    pst: PSTConfig = field(default_factory=PSTConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    start: OneShotConfig = field(default_factory=OneShotConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    layer_statistics: LayerStatisticsConfig = field(default_factory=LayerStatisticsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    additions: Additions = field(default_factory=dict, hash=False)
    """Trained modules next to the layers, each a table ``[additions.NAME]``, such as ``[additions.prompt]``
    (docs/how-to/methods.md)."""

    def problems(self) -> Iterator[str]:
        if not self.output_dir:
            yield "output_dir = '' is empty. Name the folder that the run writes to"
        for key, name, names in (("task", self.task, list(TASKS)), ("method", self.method, list(METHODS))):
            if name not in names:
                yield f"{key} = {name!r} must be one of {', '.join(map(repr, names))}"
        # Every other rule looks up the task and the method in their tables.
        if self.task in TASKS and self.method in METHODS:
            yield from self._conflicts()

    def _conflicts(self) -> Iterator[str]:
        """Yield a message for each setting that does not fit another section."""
        yield from task_conflicts(self.task, self.data, self.eval)
        conflicts_of_method = list(method_conflicts(self.method, self.pst, self.schedule.final_sparsity))
        yield from conflicts_of_method
        yield from self.start.conflicts(self.method, self.start_sparsity, self.pst)
        yield from self.quantization.conflicts(self.method, self.schedule)
        if not conflicts_of_method:  # with them, the settings to inject cannot be derived
            yield from self.model.conflicts(self.method, self.injected_pst)
        yield from self.train.conflicts(self.task, self.data.max_length, self.distillation, self.deepspeed_config)
        yield from self.distillation.conflicts(self.task)
        if self.schedule.solves:
            yield from self._conflicts_of_solves()
            if self.checkpoint.mirror:
                yield (
                    f"checkpoint.mirror = {self.checkpoint.mirror!r} does not hold the model folders that "
                    f"schedule.solves = {self.schedule.solves} writes. Remove one of the two settings"
                )
        if self.train.expert_parallel > 1:
            yield from self._conflicts_of_experts()
        yield from conflicts_of(self.additions, self)
        # The settings of [finetune] are checked as a separate run. Making it here reports them before this run starts.
        try:
            self.finetuning()
        except ConfigError as error:
            for problem in error.args:
                yield f"[finetune] with these settings: {problem}"

    def _conflicts_of_experts(self) -> Iterator[str]:
        """Yield a message for each setting that does not fit experts which are divided among ranks."""
        lead = f"train.expert_parallel = {self.train.expert_parallel}"
        if not self.deepspeed_config:
            yield f'{lead} requires ZeRO-3. Set deepspeed_config = "ds_configs/zero3.json"'
        if not self.mask_method.injects:
            yield f"{lead} divides pruned experts, and method = {self.method!r} prunes none. Set 1, or another method"
        # Calibration takes the inputs of a layer for those of the rank's batch; a divided expert has tokens of several.
        if self.pst.magnitude == "activation":
            yield f'{lead} does not support pst.magnitude = "activation". Set "weight", or train.expert_parallel = 1'
        elif self.pst.criterion and "input_norms" in self.pst.criterion_needs:
            yield (
                f'{lead} does not support pst.criterion = "{self.pst.criterion}", which needs norms of inputs. Choose '
                "another, or train.expert_parallel = 1"
            )

    def _conflicts_of_solves(self) -> Iterator[str]:
        """Yield a message for each setting that does not fit masks and weights that are solved for during training."""
        solves = f"schedule.solves = {self.schedule.solves}"
        pst = self.pst
        if self.method != "pst":
            yield f'{solves} is for method = "pst", not for method = {self.method!r}. Set schedule.solves = 0'
        if pst.update_form != LOW_RANK:
            yield only_low_rank(solves, pst.update_form)
        if self.start.method != "none":
            yield f'{solves} starts with all weights, and start.method = "{self.start.method}" prunes. Remove [start]'
        if pst.magnitude != "weight":
            yield f'{solves} ranks by ALPS, and pst.magnitude = "{pst.magnitude}" changes scores. Remove it'
        if pst.criterion:
            yield f'{solves} ranks by ALPS, not by pst.criterion = "{pst.criterion}". Remove one of them'
        patterns = [pst.pattern, *[rule.pattern for rule in pst.overrides]]
        for pattern in patterns:
            # An override without a pattern has that of [pst].
            if pattern and parse_pattern(pattern).pools_matrices:
                yield f'{solves} solves one matrix at a time, and pattern "{pattern}" pools several. Set "matrix"'
        # A solve gives the kept weights new values and writes them as the new base: see pst_ds/train/solved.py.
        if self.model.base_bits != 16:
            yield f"{solves} changes the base, which model.base_bits = {self.model.base_bits} quantises. Set 16"
        if self.distillation.weight and not self.distillation.teacher:
            yield f"{solves} changes the base, which cannot teach then. Name a dense model in distillation.teacher"

    @property
    def task_facts(self) -> TaskFacts:
        """Properties of the task that need no torch."""
        return TASKS[self.task]

    @property
    def mask_method(self) -> Method:
        """Properties of the method. Layers that train with quantised weights are always injected."""
        method = METHODS[self.method]
        if self.quantization.values:  # an injected layer quantises its weight, a plain one cannot
            return replace(method, injects=True)
        return method

    @property
    def seeded_pst(self) -> PSTConfig:
        """``pst`` with a seed: its own, or else the run's."""
        if self.pst.seed is None:
            return replace(self.pst, seed=self.seed)
        return self.pst

    @cached_property
    def injected_pst(self) -> PSTConfig:
        """The config to inject: ``seeded_pst`` with the settings that the method fixes; without scores if masks are
        solved, or ranked by a criterion that does not use them."""
        # Cached, because a config is checked each time it is made, and every layer and many messages ask for this one.
        config = self.mask_method.pst_config(self.seeded_pst)
        uses_scores = "learned_scores" in config.criterion_needs
        if self.schedule.solves or (config.criterion and not uses_scores):
            # Factors that nothing reads would have no gradient, but memory and optimizer state.
            return replace(config, score_rank=0, structured_scores=False)
        return config

    @property
    def start_sparsity(self) -> float:
        """Sparsity of the initial masks that one-shot pruning chooses."""
        if self.mask_method.masks == "ramp":
            return self.schedule.initial_sparsity
        return self.schedule.final_sparsity

    @property
    def metric(self) -> str:
        """Name of the metric that chooses the best checkpoint."""
        return self.eval.metric or self.task_facts.metrics[0]

    @property
    def eval_batch_size(self) -> int:
        """Examples per rank and evaluation batch."""
        return self.eval.batch_size or self.task_facts.eval_batch_size

    def make_schedules(self, num_steps: int) -> Schedules:
        """Return when a run of ``num_steps`` changes its masks and quantisation scales.

        Raises ConfigError for weights that would be quantised too late.
        """
        masks = self._mask_schedule(num_steps)
        return Schedules(masks, self.quantization.make_schedule(masks, num_steps))

    def _mask_schedule(self, num_steps: int) -> Schedule | None:
        """Return the sparsity schedule; None for methods that prune nothing."""
        masks = self.mask_method.masks
        if masks == "none":
            return None
        if masks == "fixed":
            return OneShotSchedule(self.schedule.final_sparsity)
        schedule = CubicSchedule(num_steps=num_steps, **asdict(self.schedule))
        length = schedule.ramp_end - schedule.ramp_start
        if length < LEAST_STEPS_OF_SOLVE * schedule.solves:
            raise ConfigError(
                f"schedule.solves = {schedule.solves}: the ramp has {length} steps, fewer than {LEAST_STEPS_OF_SOLVE} "
                f"for each. Fix: schedule.solves = {length // LEAST_STEPS_OF_SOLVE}, or a longer run"
            )
        return schedule

    def num_steps(self, num_examples: int) -> int:
        """Return the optimizer steps of a run with ``num_examples``. Raises ConfigError for less than one batch."""
        if num_examples < self.train.batch_size:
            alternative = ""
            if self.task_facts.packs_text:  # the corpus is cut into examples, so shorter ones are more
                alternative = " or data.max_length, the tokens of an example"
            raise ConfigError(
                f"data.train has {num_examples} examples, fewer than one batch of train.batch_size = "
                f"{self.train.batch_size}; lower it{alternative}"
            )
        if self.train.num_steps:
            return self.train.num_steps
        # An incomplete last batch is carried over into the next epoch, and does not count as a step here.
        batches_of_epoch = num_examples // self.train.batch_size
        return max(1, round(self.train.num_epochs * batches_of_epoch))

    def with_rates(self, *, width: int, num_steps: int, num_examples: int, num_labels: int) -> RunConfig:
        """Return the run with a value for every unset learning rate.

        Args:
            width: hidden size of the model.
            num_steps: optimizer steps of the run.
            num_examples: training examples.
            num_labels: different labels; 0 for tasks without labels.
        """
        default = default_learning_rates(
            width=width,
            num_steps=num_steps,
            epochs=num_steps * self.train.batch_size / num_examples,
            num_labels=num_labels,
            predicts_tokens=self.task_facts.predicts_tokens,
        )
        head_rate = default.head
        if self.mask_method.trains_everything:
            # "head" is then the rate of the pretrained weights too, which needs to be lower than that of a new head.
            head_rate = default.everything
        form = update_form(self.injected_pst.update_form)
        rates = {
            "score_learning_rate": default.scores,
            "update_learning_rate": default.updates * form.rate_factor,
            "embedding_learning_rate": default.embeddings,
            "head_learning_rate": head_rate,
        }
        unset = {name: rate for name, rate in rates.items() if getattr(self.train, name) is None}
        return replace(self, train=replace(self.train, **unset))  # type: ignore[arg-type]

    def finetuning(self) -> RunConfig | None:
        """Return the run of ``[finetune]``, in a folder inside the run's; None without one. Raises ConfigError."""
        if self.finetune.method == "none":
            return None
        # Fine-tuning has no scores. Its other rates are those of [finetune], not those of [train] for a pruned model.
        train = {**asdict(self.finetune), "score_learning_rate": None, "profile": ()}
        method = train.pop("method")
        if not METHODS[method].injects:  # only injected layers divide experts among ranks
            train["expert_parallel"] = 1
        settings_of_updates = {name: getattr(self.pst, name) for name in _OF_UPDATES}
        return RunConfig(
            output_dir=str(Path(self.output_dir) / FINETUNED),
            model=self.model,
            data=self.data,
            train=replace(self.train, **train),
            task=self.task,
            method=method,
            seed=self.seed,
            deepspeed_config=self.deepspeed_config,
            pst=PSTConfig(**settings_of_updates),
            eval=self.eval,
            checkpoint=self.checkpoint.inside(FINETUNED),
        )

    @property
    def finetuned_path(self) -> str:
        """Folder of the fine-tuned model of ``[finetune]``."""
        return str(Path(self.output_dir) / FINETUNED / MODEL)

    def finetuned(self) -> RunConfig:
        """Return the run after its fine-tuning, with the fine-tuned model as its base."""
        return replace(self, model=replace(self.model, path=self.finetuned_path), finetune=FinetuneConfig())

    @property
    def teacher(self) -> str:
        """Model folder of the separate teacher; "" without one. The base stands in for a ``[finetune]`` that was not
        done yet."""
        if self.distillation.teacher != FINETUNED:
            return self.distillation.teacher
        if self.finetune.method != "none":
            return self.model.path
        # The run after its fine-tuning has no [finetune] any more.
        return self.finetuned_path

    def started(self) -> RunConfig:
        """Return the run after its one-shot pruning, with the pruned model in the run folder as its base.

        A base model that was its own teacher is kept as a separate teacher, because a teacher must be dense.
        """
        if self.start.method == "none":
            return self
        distillation = self.distillation
        if distillation.weight and not distillation.teacher:
            teacher = self.model.path
            if teacher == self.finetuned_path:
                # The name stays right when the run folder moves; a path into it would not.
                teacher = FINETUNED
            distillation = replace(distillation, teacher=teacher)
        model = replace(self.model, path=str(Path(self.output_dir) / START))
        return replace(self, model=model, distillation=distillation, start=OneShotConfig())

    def micro_batch_size(self, world_size: int) -> int:
        """Return the maximum number of examples of a group of ranks per micro-batch; some ranks have one less if the
        batch does not divide evenly.

        Raises ConfigError if ranks cannot be grouped, or if a rank would have no example.
        """
        degree = self.train.sequence_parallel
        steps = self.train.gradient_accumulation_steps
        groups = self.train.groups_of_ranks(world_size)
        shares = groups * steps
        if self.train.batch_size < shares:
            of_ranks = "ranks"
            if degree > 1:  # the ranks of a group share each sequence
                of_ranks = f"groups of {degree} ranks"
            raise ConfigError(
                f"train.batch_size = {self.train.batch_size} is less than an example for each of {groups} {of_ranks} "
                f"x {steps} accumulation steps; make it {shares} or more, or start fewer ranks"
            )
        return -(-self.train.batch_size // shares)  # rounded up
