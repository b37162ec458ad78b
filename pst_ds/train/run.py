"""One run from its config to its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from pst_ds.atomic_files import write_text_atomic
from pst_ds.checkpoint.format import Checkpoint, CheckpointState
from pst_ds.checkpoint.restore import base_fingerprint, load_into
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.data.tasks import ExampleSet, Task, task_of
from pst_ds.errors import InputError
from pst_ds.file_names import CHECKPOINTS, RESULT_FILE, STALLS
from pst_ds.json_text import json_of
from pst_ds.masks.layer_stats import chosen_layers
from pst_ds.nn.experts import leaf_class
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.model_structure import model_width
from pst_ds.parallel.ds_config import (
    RunNumbers,
    load_deepspeed_config,
    require_deepspeed,
    resolve_deepspeed_config,
    zero_stage,
)
from pst_ds.parallel.engine import Engine, build_engine, optimizer_bytes
from pst_ds.parallel.launch import LaunchEnvironment, device_of, init_distributed
from pst_ds.parallel.ranks import barrier, is_main, of_main, raise_on_all_ranks, world_size
from pst_ds.parallel.stop_signals import StoppedError as StoppedError
from pst_ds.parallel.watchdog import watching
from pst_ds.train import run_folder
from pst_ds.train.calibration import activation_norms, load_norms, save_norms, set_norms
from pst_ds.train.checkpointer import Checkpointer
from pst_ds.train.divergence import DivergedError
from pst_ds.train.evaluate import predict
from pst_ds.train.expert_tokens import CountsOfExperts, counts_of_experts, warning_of_unused
from pst_ds.train.fit import Fit, judged_fit, watched_steps
from pst_ds.train.loop import FINAL_TAGS, Loop, LoopState
from pst_ds.train.model import BuiltModel, build_model, load_tokenizer, meta_model, num_trainable, require_precision
from pst_ds.train.monitor.dense_run import DenseRun, read_dense_run
from pst_ds.train.monitor.memory_snapshot import snapshot_when_memory_ends
from pst_ds.train.objective import Objective, load_teacher, require_teacher
from pst_ds.train.one_shot.start import remark_on_shares, start_run
from pst_ds.train.reporting import open_metrics
from pst_ds.train.sequences.documents import require_documents_apart
from pst_ds.train.sequences.shared import require_shareable, shared_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Splits: TypeAlias = tuple[ExampleSet, ExampleSet | None]
"""The examples to train on, and those to validate with."""
_AFTER_STALL_SECONDS = 60.0
"""Longer than the watchdog's patience, so that it is the one to say which rank hangs, and not the collective."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is read and checked, before its model is built; the same on every rank."""

    run: RunConfig
    launch: LaunchEnvironment
    labels: list[str]
    tokenizer: PreTrainedTokenizerBase
    ds_config: dict[str, Any] | None
    """The resolved DeepSpeed config, or None for one process without DeepSpeed."""
    device: str
    width: int = 1
    """Hidden size of the model."""

    @property
    def task(self) -> Task:
        return task_of(self.run)

    def load(self, split: str) -> Any:
        """Return the examples of a split. Raises ConfigError."""
        return self.task.load(self.run.data, split, self.tokenizer, self.labels)

    def with_rates(self, run: RunConfig, examples: ExampleSet) -> RunConfig:
        """Return ``run``, of this model on ``examples``, with a number for every learning rate."""
        number, num_labels = len(examples), self.task.num_labels(examples)
        return run.with_rates(
            width=self.width, num_steps=run.num_steps(number), num_examples=number, num_labels=num_labels
        )


Evaluation: TypeAlias = Callable[[Engine, ExampleSet, Prepared], dict[str, float]]
"""Computes the metrics of an engine's model. Collective."""


def prepare(
    run: RunConfig, launch: LaunchEnvironment, *, run_file: str = "the run file", labels: list[str] | None = None
) -> Prepared:
    """Read and check everything that costs little, and join the process group. Collective. Raises InputError."""
    run.micro_batch_size(launch.world_size)
    if not run.deepspeed_config and launch.world_size > 1:
        raise ConfigError(
            f"{launch.world_size} ranks, but deepspeed_config is not set; set deepspeed_config = "
            '"ds_configs/zero3_cpu.json" (or zero3.json on GPUs), or start one process'
        )
    checked: Prepared | InputError
    try:
        checked = _checked(run, launch, run_file, labels)
    except InputError as error:
        if launch.world_size == 1 or find_spec("deepspeed") is None:
            raise
        checked = error  # perhaps on this rank alone: the others must hear of it
    if run.deepspeed_config:
        timeout = run.train.stall_timeout_seconds
        init_distributed(launch, timeout_seconds=timeout + _AFTER_STALL_SECONDS if timeout else 0.0)
    return raise_on_all_ranks(partial(_raise_or_return, checked))


def _checked(run: RunConfig, launch: LaunchEnvironment, run_file: str, labels: list[str] | None) -> Prepared:
    if run.deepspeed_config:
        require_deepspeed()
    run.tracking.require_installed()
    raw = load_deepspeed_config(run.deepspeed_config) if run.deepspeed_config else None
    labels = labels or task_of(run).label_names(run.data)
    tokenizer = load_tokenizer(run)
    shapes = meta_model(run, labels, tokenizer, num_shards=launch.world_size)  # refuses what cannot be injected
    require_precision(run, shapes)
    require_teacher(run, shapes)
    require_shareable(run, shapes.config, zero_stage(raw), run.micro_batch_size(launch.world_size))
    chosen_layers(list(pst_layers(shapes)), run.pictures.layers)  # refuses what is not there
    resolved = None
    if raw is not None:
        micro_batch, accumulation = run.micro_batch_size(launch.world_size), run.train.gradient_accumulation_steps
        numbers = RunNumbers(
            micro_batch * accumulation * launch.world_size,  # it knows no shares of unequal size, nor shared sequences
            micro_batch,
            accumulation,
            run.train.gradient_clipping,
            run.train.precision == "bf16",
            num_trainable(shapes),
            leaf_class=leaf_class(shapes),
        )
        resolved = resolve_deepspeed_config(raw, numbers, source=run.deepspeed_config, run_file=run_file)
    return Prepared(run, launch, labels, tokenizer, resolved, device_of(launch), model_width(shapes))


def _raise_or_return(checked: Prepared | InputError) -> Prepared:
    if isinstance(checked, InputError):
        raise checked
    return checked


def prepare_single(run: RunConfig, checkpoint: Checkpoint) -> Prepared:
    """Prepare to read a checkpoint on one process without DeepSpeed, whatever the run trained on."""
    launch = LaunchEnvironment(0, 1, 0)
    return Prepared(run, launch, checkpoint.state.labels, load_tokenizer(run), None, device_of(launch))


def build(
    prepared: Prepared, checkpoint: Checkpoint | None = None, *, label_scale: tuple[float, float] | None = None
) -> tuple[BuiltModel, Engine]:
    """Build the run's model, with the values of ``checkpoint`` if given, and its engine, which learns labels on their
    ``label_scale``, a mean and a standard deviation. Collective."""
    run, ds_config = prepared.run, prepared.ds_config
    zero3_config = ds_config if zero_stage(ds_config) == 3 else None
    built = build_model(run, prepared.labels, prepared.tokenizer, zero3_config=zero3_config, label_scale=label_scale)
    if checkpoint is not None:
        load_into(built.module, checkpoint)
    if ds_config is None:
        built.module.to(prepared.device)
    engine = build_engine(
        built.module,
        built.parameter_groups(run),
        ds_config=ds_config,
        gradient_accumulation_steps=run.train.gradient_accumulation_steps,
        gradient_clipping=run.train.gradient_clipping,
    )
    return built, engine


@run_folder.without_other_runs
def train_run(
    prepared: Prepared,
    *,
    resume: bool = False,
    restart: bool = False,
    quiet: bool = False,
    splits: Splits | None = None,
    evaluation: Evaluation | None = None,
) -> dict[str, Any]:
    """Train, evaluate and save; return the result, as written to result.json. Collective.

    ``resume`` continues from the newest valid checkpoint of the run's folder, or starts if nothing was saved yet;
    ``restart`` sets existing checkpoints aside and starts from step 0; without either, a folder that has some is
    refused. ``splits``: those of :func:`load_splits`, if loaded before; ``evaluation`` replaces :func:`evaluate`.
    Raises InputError, StoppedError after a signal, DivergedError, CheckpointWriteError.
    """
    examples, validation = splits or load_splits(prepared)
    num_steps = prepared.run.num_steps(len(examples))
    prepared.task.require_enough(examples, num_steps * prepared.run.train.batch_size)
    run = start_run(prepared.run, examples, is_new=not (resume or restart), quiet=quiet)
    run = prepared.with_rates(run, examples)
    prepared, folder = replace(prepared, run=run), Path(run.output_dir)
    dense = raise_on_all_ranks(lambda: _dense_run(run, examples.digest))
    schedules = run.make_schedules(num_steps)
    begun = _begin(prepared, examples, num_steps, resume=resume, restart=restart, quiet=quiet)
    checkpoint, engine, objective = begun.checkpoint, begun.engine, begun.objective
    step, seconds = run_folder.reached(checkpoint)
    metrics = open_metrics(run, engine.module, prepared.device, num_steps, step, seconds, quiet=quiet, dense=dense)
    why = objective.why_all_logits(engine.module)
    about_loss = f"the loss holds the logits of a whole micro-batch, because {why}" if why else ""
    for remark in (begun.warning, prepared.task.remark(run.data, examples), remark_on_shares(run), about_loss):
        metrics.say(remark)
    loop = Loop(
        run, engine, schedules, examples, prepared.tokenizer, num_steps, prepared.device, metrics, objective
    )  # fmt: skip
    checkpointer = Checkpointer(
        run, engine, schedules, metrics, folder=folder / CHECKPOINTS, num_steps=num_steps,
        evaluate=None if validation is None else partial(evaluation or evaluate, engine, validation, prepared),
        lower_is_better=prepared.task.lower_is_better,
        watched=watched_steps(run, schedules.masks, num_steps, len(examples), len(validation or ())),
        new_state=_new_state(prepared),
        new_progress=partial(run_folder.progress_of, run, engine, examples.digest, zero_stage(prepared.ds_config)),
        checkpoint=checkpoint,
    )  # fmt: skip
    judge = partial(judged_fit, run, prepared.task, examples, num_steps, dense, metrics)
    state, final, fit, experts = _train_to_the_end(loop, checkpointer, begun.state, folder / STALLS, judge)
    return _result(prepared, loop, state, checkpointer, final, fit, experts)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A run whose folder is begun, at the step that it trains from."""

    engine: Engine
    objective: Objective
    state: LoopState
    checkpoint: Checkpoint | None
    """That it goes on from."""
    warning: str


def _begin(
    prepared: Prepared, examples: ExampleSet, num_steps: int, *, resume: bool, restart: bool, quiet: bool
) -> _Begun:
    """Build what trains, from the checkpoint to go on from if there is one, and begin the folder. Collective. Raises as
    train_run."""
    run, folder = prepared.run, Path(prepared.run.output_dir)
    checkpoint = run_folder.checkpoint_to_go_on_from(run, examples.digest, quiet=quiet) if resume else None
    if checkpoint is None and not restart:
        run_folder.require_no_checkpoints(folder)
    teacher = raise_on_all_ranks(partial(load_teacher, run, prepared.labels, prepared.tokenizer, prepared.device))
    _, engine = build(prepared, checkpoint, label_scale=prepared.task.label_scale(examples))
    warning = require_documents_apart(engine, run, examples, prepared.device)
    objective = Objective(run, teacher, shared_sequences(engine, run, prepared.device))
    state = run_folder.restore(engine, checkpoint, run) if checkpoint else LoopState()
    if checkpoint is None:
        run_folder.set_aside_checkpoints(folder)
    if is_main():
        run_folder.write_files(run, prepared.ds_config, is_over=state.step == num_steps)
    barrier()
    if run.ranks_by_activation:
        _calibrate(prepared, engine, examples, resumed=checkpoint is not None)
    return _Begun(engine, objective, state, checkpoint, warning)


def load_splits(prepared: Prepared) -> Splits:
    """Load the examples, the same on every rank, to train on and to validate with. Collective. Raises InputError on all
    ranks if one cannot read its files, or reads others."""
    run = prepared.run
    examples = raise_on_all_ranks(lambda: prepared.load("train"))
    validation = raise_on_all_ranks(lambda: prepared.load("validation")) if run.data.validation else None
    run_folder.require_same_everywhere(examples.digest, run.data.trained_on)
    return examples, validation


def _dense_run(run: RunConfig, digest: str) -> DenseRun | None:
    """Read the dense run that is shown next to this one. Raises ConfigError when they cannot be compared."""
    dense = read_dense_run(run)
    if dense:
        dense.require_text(run, digest)
    return dense


def _calibrate(prepared: Prepared, engine: Engine, examples: ExampleSet, *, resumed: bool) -> None:
    """Give the scores the norms of their inputs; a continued run has those that it began with. Collective."""
    run, folder = prepared.run, Path(prepared.run.output_dir)
    if resumed:
        set_norms(engine.module, raise_on_all_ranks(lambda: load_norms(folder, engine.module)))
        return
    count = min(run.pst.calibration_examples, len(examples))
    task, tokenizer = prepared.task, prepared.tokenizer
    drawn, chosen = raise_on_all_ranks(partial(task.sample, examples, count, f"{run.seed}/calibration"))
    norms = activation_norms(engine, task, drawn, chosen, tokenizer, run.eval_batch_size, prepared.device)
    if is_main():
        save_norms(folder, norms)
    set_norms(engine.module, norms)


def _train_to_the_end(
    loop: Loop, checkpointer: Checkpointer, start: LoopState, stalls: Path, judge: Callable[[], Fit]
) -> tuple[LoopState, dict[str, float], Fit | None, CountsOfExperts]:
    """Return the state after the last step, its metrics, what ``judge`` returns, and counts of experts, all being on
    disk. Collective. Raises as train_run."""
    state, fit = start, None
    try:
        seconds = loop.run.train.stall_timeout_seconds
        watched = watching(stalls, seconds, loop.pace.hosts)
        with snapshot_when_memory_ends(stalls.parent, loop.device), watched:
            for state in loop.steps(start):
                checkpointer.after_step(state)
                if state.stopped_by:
                    break
            final, experts = checkpointer.finish(state), counts_of_experts(loop.engine.module)
        if state.step == loop.num_steps:
            fit = judge()
            loop.metrics.say(warning_of_unused(experts.get("expert_tokens", {}), start.step))
            loop.metrics.experts(state.step, experts)
            loop.metrics.settings(_settings(loop.run), [*(f"eval/{name}" for name in final), *FINAL_TAGS])
    except DivergedError as error:
        raise DivergedError(
            f"{error}. Lower rates can be tried from {checkpointer.newest()} on: --resume "
            "--set train.update_learning_rate=…"
        ) from None
    finally:
        checkpointer.close()
        loop.metrics.close()
    if state.stopped_by and state.step < loop.num_steps:
        raise StoppedError(checkpointer.how_it_stopped(state.stopped_by, state.step))
    return state, final, fit, experts


def _settings(run: RunConfig) -> dict[str, Any]:
    """Return the settings that TensorBoard compares runs by; neither data nor paths."""
    names = ("task", "method", "seed", "model.path", "model.dropout", "distillation.weight")
    settings = run_folder.flat_table(run).items()
    return {k: v for k, v in settings if k in names or k.startswith(("pst.", "schedule.", "quantization.", "train."))}


def _result(
    prepared: Prepared,
    loop: Loop,
    state: LoopState,
    checkpointer: Checkpointer,
    metrics: dict[str, float],
    fit: Fit | None,
    experts: CountsOfExperts,
) -> dict[str, Any]:
    """Return the result of a finished run, which rank 0 also writes. Collective."""
    engine = loop.engine
    result = {
        "task": prepared.run.task,
        "method": prepared.run.method,
        "steps": state.step,
        "skipped_steps": engine.skipped_steps,
        "world_size": world_size(),
        "sparsity_requested": loop.schedules.sparsity_at(state.step),
        "sparsity_in_masks": state.masks.sparsity if state.masks else 0.0,
        "mask_checksum": state.masks.checksum if state.masks else "",
        "trained_parameters": num_trainable(engine.module),
        "optimizer_bytes_per_rank": optimizer_bytes(engine),
        "metrics": metrics,
        "best_step": checkpointer.best_step,
        **experts,
        "fit": fit.as_table() if fit else None,
        "seconds": round(loop.metrics.seconds, 1),
    }
    if is_main():
        write_text_atomic(Path(prepared.run.output_dir) / RESULT_FILE, json_of(result, indent=1) + "\n")
    barrier()
    return result


def _new_state(prepared: Prepared) -> partial[CheckpointState]:
    """Make a CheckpointState with what all checkpoints of a run have in common."""
    run = prepared.run
    return partial(
        CheckpointState,
        precision=run.train.precision,
        device_type=prepared.device.partition(":")[0],
        base_path=run.model.path,
        base_fingerprint=of_main(lambda: base_fingerprint(run.model.path)),
        labels=prepared.labels,
    )


def evaluate(engine: Engine, examples: ExampleSet, prepared: Prepared) -> dict[str, float]:
    """Compute the metrics of the engine's model on ``examples``. Collective; leaves the engine in evaluation mode."""
    engine.eval()
    task, batch_size = prepared.task, prepared.run.eval_batch_size
    outcomes = predict(engine, task, examples, prepared.tokenizer, batch_size, prepared.device)
    return task.metrics(outcomes, examples)


def masked_model(prepared: Prepared, checkpoint: Checkpoint) -> nn.Module:
    """Return the model as it was trained, with its PST modules, in evaluation mode on one process."""
    built = build_model(prepared.run, prepared.labels, prepared.tokenizer, zero3_config=None)
    load_into(built.module, checkpoint)
    return built.module.to(prepared.device).eval()
