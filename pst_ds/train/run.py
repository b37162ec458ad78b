"""Train a run from its config to the final checkpoint."""

from functools import partial
from pathlib import Path
from typing import NotRequired, TypeAlias, TypedDict

from torch import nn

from pst_ds.atomic_files import write_text_atomic
from pst_ds.checkpoint.format import Checkpoint
from pst_ds.checkpoint.restore import load_into
from pst_ds.config.run import RunConfig
from pst_ds.config.toml import load_run_or_folder
from pst_ds.core.kernels.host import multiplies_bf16
from pst_ds.data.tasks import ExampleSet
from pst_ds.data.tokens.loading import fetch_sources, has_addresses
from pst_ds.file_names import RESULT_FILE, STALLS
from pst_ds.json_text import json_of
from pst_ds.nn.base_model import Pretrained
from pst_ds.nn.flat_factors import flatten_factors
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.tables.rounded import round_tables
from pst_ds.parallel import sharding
from pst_ds.parallel.ds_config import zero_stage
from pst_ds.parallel.engine import Engine, build_engine, optimizer_bytes, release
from pst_ds.parallel.launch import launch_environment
from pst_ds.parallel.ranks import barrier, is_main, on_all_ranks_at_length, raise_on_all_ranks, world_size
from pst_ds.parallel.stop_signals import StoppedError as StoppedError
from pst_ds.parallel.stop_signals import name_of
from pst_ds.parallel.watchdog import watching
from pst_ds.train import run_folder
from pst_ds.train.calibration import calibrate
from pst_ds.train.checkpointer import Checkpointer
from pst_ds.train.divergence import DivergedError
from pst_ds.train.evaluate import predict
from pst_ds.train.expert_tokens import CountsOfExperts, counts_of_experts, warning_of_unused
from pst_ds.train.finetune import finetune
from pst_ds.train.loop import Loop, LoopState
from pst_ds.train.model import build_model
from pst_ds.train.monitor.metrics import MetricsWriter
from pst_ds.train.monitor.trackers import Trackers
from pst_ds.train.objective import Objective, load_teacher, teacher_of
from pst_ds.train.one_shot.start import remark_on_shares, start_run
from pst_ds.train.prepare import prepare as prepare
from pst_ds.train.prepare import prepare_single as prepare_single
from pst_ds.train.resolved import ResolvedRun, num_trainable
from pst_ds.train.resume import RunProgress, checkpoint_to_resume, flat_table, on_base_of, restore
from pst_ds.train.run_context import RunContext, require_same_data
from pst_ds.train.sequences import require_documents_apart, shared_sequences
from pst_ds.train.stages import require_stages

Splits: TypeAlias = tuple[ExampleSet, ExampleSet | None]
"""The examples to train on, and those to validate with."""
_EMULATED_BF16 = (
    "this processor has no instructions for bf16, which is several times slower here than fp32: set train.precision = "
    '"fp32" if the run stays on CPUs like it'
)


class TrainResult(TypedDict):
    """Result of a run, as written to result.json."""

    task: str
    method: str
    steps: int
    """Optimizer steps applied."""
    skipped_steps: int
    world_size: int
    sparsity_requested: float
    sparsity_in_masks: float
    mask_checksum: str
    """Checksum of all masks; "" without masks."""
    trained_parameters: int
    optimizer_bytes_per_rank: int
    metrics: dict[str, float]
    """Metrics on the validation split after the last step; empty without one."""
    best_step: int | None
    """Step of the best checkpoint; None without an evaluation at the final sparsity."""
    expert_tokens: NotRequired[dict[str, list[int]]]
    """Tokens of each expert, by module; only for mixtures of experts."""
    expert_zeros: NotRequired[dict[str, list[int]]]
    """Pruned weights of each expert, by stack; only for mixtures of experts."""
    seconds: float
    """Seconds of training, over all processes of the run."""


def train_run(
    run: RunConfig | str | Path | ResolvedRun,
    *,
    resume: bool = False,
    restart: bool = False,
    quiet: bool = False,
    run_file: str = "the run config",
) -> TrainResult:
    """Train a run, evaluate and save it, and return its result.

    Call it on every rank that a launcher has started, or in one process. Collective.

    Args:
        run: The run, as its config, the path of its run file or run folder, or resolved already.
        resume: Continue from the newest valid checkpoint of the run's folder, or start if nothing was saved yet.
        restart: Set existing checkpoints aside and start from step 0.
        quiet: Show no progress.
        run_file: Name of the run file in messages, for a ``run`` that is a config.

    Without ``resume`` and ``restart``, a folder with checkpoints is rejected.

    Raises:
        InputError: The run cannot be trained.
        StoppedError: A signal stopped the run, which was saved.
        DivergedError: The loss or the gradients are not finite.
        CheckpointWriteError: The last checkpoint could not be written.
    """
    if isinstance(run, str | Path):
        run_file = str(run)
        run = load_run_or_folder(run)
    context = prepare(run, launch_environment(), run_file=run_file)
    return train_prepared(context, resume=resume, restart=restart, quiet=quiet)


def build(
    context: RunContext, checkpoint: Checkpoint | None = None, *, label_scale: tuple[float, float] | None = None
) -> Engine:
    """Build the run's model in its engine. Collective.

    Args:
        checkpoint: Checkpoint to load into the model; None keeps the values of the base model.
        label_scale: Mean and standard deviation of the labels, on which a new head's outputs start.
    """
    run = context.run
    ds_config = context.ds_config
    zero3_config = ds_config if zero_stage(ds_config) == 3 else None  # zero.Init is for stage 3 only
    based = on_base_of(run, checkpoint)
    # a download may take longer than a collective waits
    on_all_ranks_at_length(Pretrained(based.model.path, "model.path").download)
    with sharding.copying_frozen(context.copy_ranks):
        built = build_model(
            based, context.labels, context.tokenizer, zero3_config=zero3_config, label_scale=label_scale
        )
        if checkpoint is not None:
            load_into(built.module, checkpoint)
        # DeepSpeed's engine moves the model itself
        if ds_config is None:
            built.module.to(context.device)
        groups = built.parameter_groups(run)
        if ds_config is not None:
            # after the values are loaded, which files have by layer, and before the engine counts its tensors
            flatten_factors(built.module, groups)
        return build_engine(
            built.module,
            groups,
            ds_config=ds_config,
            gradient_accumulation_steps=run.train.gradient_accumulation_steps,
            gradient_clipping=run.train.gradient_clipping,
        )


def train_prepared(
    context: RunContext,
    *,
    resume: bool = False,
    restart: bool = False,
    quiet: bool = False,
    splits: Splits | None = None,
) -> TrainResult:
    """Train a prepared run, see :func:`train_run`. Collective.

    Args:
        splits: Result of :func:`load_splits`; None to load them.
    """
    with run_folder.without_other_runs(Path(context.run.output_dir)):
        # before the data is read, which may take long
        mirror = run_folder.open_mirror(context.run, resume=resume)
        if splits is None:
            splits = load_splits(context)
        examples, validation = splits
        # the number of examples gives the number of steps, so this could not be checked before
        raise_on_all_ranks(lambda: require_stages(context.run, len(examples)))
        context = run_stages(context, splits, resume=resume, restart=restart, quiet=quiet).with_rates(examples)
        run = context.run
        checkpoint = None
        if resume:
            checkpoint = checkpoint_to_resume(run, examples.digest, quiet=quiet, mirror=mirror)
        if checkpoint is None and not restart:
            run_folder.require_no_checkpoints(Path(run.output_dir))
        loop, state = _build_loop(context, examples, checkpoint, quiet=quiet)
        measure = None
        if validation is not None:
            measure = partial(evaluate, loop.engine, validation, context)
        try:
            checkpointer = Checkpointer(loop, evaluate=measure, checkpoint=checkpoint, mirror=mirror)
            return _train_to_the_end(loop, checkpointer, state)
        finally:
            release(loop.engine)  # another run may follow in this process


def run_stages(context: RunContext, splits: Splits, *, resume: bool, restart: bool, quiet: bool) -> RunContext:
    """Fine-tune and prune the run's model by ``[finetune]`` and ``[start]``, unless that was done before.

    Return the context of the rest of the run. Collective. Raises as :func:`train_run`.
    """
    has_stages = context.run.finetune.method != "none" or context.run.start.method != "none"
    if has_stages and not (resume or restart):
        # train_prepared checks this, too, but after hours of the stages
        run_folder.require_no_checkpoints(Path(context.run.output_dir))
    examples, _ = splits
    train = partial(train_prepared, resume=resume, restart=restart, quiet=quiet, splits=splits)
    # the fine-tuned model is the one that is pruned
    context = finetune(context, examples, train, quiet=quiet)
    return context.with_run(start_run(context, examples, quiet=quiet))


def load_splits(context: RunContext) -> Splits:
    """Load the examples to train on and to validate with. Collective.

    Raises InputError on all ranks if a rank cannot read its files, or reads other examples than rank 0.
    """
    run = context.run
    if run.task == "causal-lm" and has_addresses(run.data):
        # a download may take longer than a collective waits
        on_all_ranks_at_length(lambda: fetch_sources(run.data))
    examples = raise_on_all_ranks(lambda: context.load("train"))
    validation = None
    if run.data.validation:
        validation = raise_on_all_ranks(lambda: context.load("validation"))
    require_same_data(examples.digest, run.data.trained_on)
    return examples, validation


def _build_loop(
    context: RunContext, examples: ExampleSet, checkpoint: Checkpoint | None, *, quiet: bool
) -> tuple[Loop, LoopState]:
    """Build model and loop, restore them from ``checkpoint`` if there is one, and write the run's folder. Collective.

    Raises as :func:`train_run`.
    """
    run = context.run
    folder = Path(run.output_dir)
    num_steps = run.num_steps(len(examples))
    place = teacher_of(run)
    if place is not None:
        on_all_ranks_at_length(place.download)
    # before the engine is built: load_frozen must not run under zero.Init
    teacher = raise_on_all_ranks(lambda: load_teacher(context))
    engine = build(context, checkpoint, label_scale=context.task.label_scale(examples))
    # forward passes, which are collective under ZeRO-3, so every rank makes them in this order
    leaks = require_documents_apart(engine, context, examples)
    objective = Objective(context, teacher, shared_sequences(engine, context))
    if checkpoint is None:
        state = LoopState()
        run_folder.set_aside_checkpoints(folder)
    else:
        state = restore(engine, checkpoint, run)
    # after everything that may refuse the run, so that a refused one changes no files
    if is_main():
        run_folder.write_files(run, context.ds_config, is_finished=state.step == num_steps)
    barrier()  # no rank writes into the folder before rank 0 has removed what an earlier run left there
    if run.mask_method.masks != "none" and "input_norms" in run.pst.criterion_needs:
        calibrate(context, engine, examples, resumed=checkpoint is not None)
    metrics = _open_metrics(context, engine, examples, checkpoint, quiet=quiet)
    for remark in (
        _remark_on_precision(context),
        leaks,
        _remark_on_logits(objective, engine),
        context.task.remark(run.data, examples),
        remark_on_shares(run),
        context.remark,
    ):
        metrics.say(remark)  # nothing is shown for ""
    loop = Loop(
        context=context,
        engine=engine,
        examples=examples,
        schedules=run.make_schedules(num_steps),
        metrics=metrics,
        objective=objective,
    )
    return loop, state


def _remark_on_precision(context: RunContext) -> str:
    """Return a remark if the processor emulates the run's bf16; "" otherwise."""
    uses_bf16 = context.device == "cpu" and context.run.train.precision == "bf16"
    if uses_bf16 and not multiplies_bf16():
        return _EMULATED_BF16
    return ""


def _remark_on_logits(objective: Objective, engine: Engine) -> str:
    """Return a remark if the loss needs memory for all logits of a micro-batch; "" otherwise."""
    reason = objective.why_all_logits(engine.module)
    if not reason:
        return ""
    return f"the loss holds the logits of a whole micro-batch, because {reason}"


def _open_metrics(
    context: RunContext, engine: Engine, examples: ExampleSet, checkpoint: Checkpoint | None, *, quiet: bool
) -> MetricsWriter:
    """Open metrics and trackers. Collective. Raises ConfigError on every rank for a tracker that does not start."""
    run = context.run
    folder = Path(run.output_dir)
    step = 0
    seconds = 0.0
    if checkpoint is not None:
        step = checkpoint.state.step
        seconds = RunProgress.read(checkpoint).seconds

    # rank 0 reports for all; raise_on_all_ranks tells the others whether it could start
    def trackers() -> Trackers | None:
        if not run.tracking.to or not is_main():
            return None
        return Trackers(run.tracking, folder, flat_table(run), goes_on=step > 0)

    return MetricsWriter(
        folder,
        num_steps=run.num_steps(len(examples)),
        is_main=is_main(),
        quiet=quiet,
        step=step,
        seconds=seconds,
        layers={name: layer.whole_layout.numel for name, layer in pst_layers(engine.module).items()},
        trackers=raise_on_all_ranks(trackers),
    )


def _train_to_the_end(loop: Loop, checkpointer: Checkpointer, state: LoopState) -> TrainResult:
    """Train from ``state`` and save; return the result, which rank 0 also writes. Collective.

    Raises as :func:`train_run`.
    """
    first_step = state.step
    folder = Path(loop.run.output_dir)
    try:
        with watching(folder / STALLS, loop.run.train.stall_timeout_seconds, loop.pace.hosts):
            for _ in loop.steps(state):  # changes the state in place
                checkpointer.after_step(state)
                # a checkpoint does not have the sums of a solve, so a stop waits for the solve
                if state.stopped_by and not loop.source.is_collecting:
                    break
            # both are collective, so a rank that is missing is reported as a stall
            metrics = checkpointer.finish(state)
            experts = counts_of_experts(loop.engine.module)
        if state.step == loop.num_steps:
            loop.metrics.say(warning_of_unused(experts.get("expert_tokens", {}), first_step))
    except DivergedError as error:
        raise DivergedError(
            f"{error}. Lower rates can be tried from {checkpointer.newest()} on: set "
            "resume = true and a lower train.update_learning_rate"
        ) from None
    finally:
        # waits for a save in progress, also after an error
        checkpointer.close()
        loop.metrics.close()
    if state.stopped_by and state.step < loop.num_steps:
        after = f"after step {state.step} of {loop.num_steps}"
        raise StoppedError(
            f"stopped by {name_of(state.stopped_by)} {after}, saved in {checkpointer.newest()}; continue with "
            "resume = true"
        )
    result = _result(loop, state, metrics, checkpointer.best_step, experts)
    if is_main():
        write_text_atomic(folder / RESULT_FILE, json_of(result, indent=1) + "\n")
    barrier()  # the result exists once any rank returns
    return result


def _result(
    loop: Loop, state: LoopState, metrics: dict[str, float], best_step: int | None, experts: CountsOfExperts
) -> TrainResult:
    """Return the result of a finished run. Collective."""
    sparsity = 0.0
    checksum = ""
    if state.masks is not None:
        sparsity = state.masks.sparsity
        checksum = state.masks.checksum
    result = TrainResult(
        task=loop.run.task,
        method=loop.run.method,
        steps=state.step,
        skipped_steps=loop.engine.skipped_steps,
        world_size=world_size(),
        sparsity_requested=loop.schedules.sparsity_at(state.step),
        sparsity_in_masks=sparsity,
        mask_checksum=checksum,
        trained_parameters=num_trainable(loop.engine.module),
        optimizer_bytes_per_rank=optimizer_bytes(loop.engine),
        metrics=metrics,
        best_step=best_step,
        seconds=round(loop.metrics.seconds, 1),
    )
    if experts:
        result["expert_tokens"] = experts["expert_tokens"]
        result["expert_zeros"] = experts["expert_zeros"]
    return result


def evaluate(engine: Engine, examples: ExampleSet, context: RunContext) -> dict[str, float]:
    """Compute the metrics of the engine's model on ``examples``. Collective; leaves the engine in evaluation mode."""
    engine.eval()
    return context.task.metrics(predict(engine, context, examples), examples)


def masked_model(context: RunContext, checkpoint: Checkpoint) -> nn.Module:
    """Return the model as it was trained, with its PST modules, in evaluation mode on one process."""
    run = on_base_of(context.run, checkpoint)
    built = build_model(run, context.labels, context.tokenizer, zero3_config=None)
    load_into(built.module, checkpoint)
    if checkpoint.state.rounds:
        round_tables(built.module)
    return built.module.to(context.device).eval()
