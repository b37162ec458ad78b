"""One run from its config to its last checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pst_ds.nn.checkpoint import (
    Checkpoint,
    CheckpointState,
    base_fingerprint,
    load_into,
    read_checkpoint,
    save_checkpoint,
    weight_scales,
)
from pst_ds.parallel.ds_config import (
    RunNumbers,
    load_deepspeed_config,
    require_deepspeed,
    resolve_deepspeed_config,
    zero_stage,
)
from pst_ds.parallel.engine import Engine, build_engine, optimizer_bytes
from pst_ds.parallel.launch import LaunchEnvironment, device_of, init_distributed
from pst_ds.parallel.ranks import barrier, is_main, world_size
from pst_ds.train import loop as training
from pst_ds.train.config import ConfigError, RunConfig
from pst_ds.train.evaluate import predict
from pst_ds.train.metrics import MetricsWriter
from pst_ds.train.model import BuiltModel, build_model, load_tokenizer, meta_model, num_trainable, parameter_groups
from pst_ds.train.run_file import dump_run
from pst_ds.train.tasks import ExampleSet, Task, task_of

RUN_FILE, RESULT_FILE = "run.toml", "result.json"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run needs before its model: read and checked, the same on every rank."""

    run: RunConfig
    launch: LaunchEnvironment
    labels: list[str]
    tokenizer: Any
    ds_config: dict[str, Any] | None
    """Resolved, or None for one process without DeepSpeed."""
    device: str

    @property
    def task(self) -> Task:
        return task_of(self.run)

    def load(self, split: str) -> Any:
        """The examples of a split. Raises ConfigError."""
        return self.task.load(self.run.data, split, self.tokenizer, self.labels)


def prepare(
    run: RunConfig, launch: LaunchEnvironment, *, run_file: str = "the run file", labels: list[str] | None = None
) -> Prepared:
    """Read and check everything that costs little, before any rank waits for another. Then join the process group.

    Raises InputError. Collective.
    """
    micro_batch_size = run.micro_batch_size(launch.world_size)
    if not run.deepspeed_config and launch.world_size > 1:
        raise ConfigError(
            f"{launch.world_size} ranks, but deepspeed_config is not set; set deepspeed_config = "
            '"ds_configs/zero3_cpu.json" (or zero3.json on GPUs), or start one process'
        )
    raw = None
    if run.deepspeed_config:
        require_deepspeed()
        raw = load_deepspeed_config(run.deepspeed_config)
    labels = labels or task_of(run).label_names(run.data)
    tokenizer = load_tokenizer(run)
    shapes = meta_model(run, labels, tokenizer, num_shards=launch.world_size)  # refuses what cannot be injected
    resolved = None
    if raw is not None:
        numbers = RunNumbers(
            run.train.batch_size,
            micro_batch_size,
            run.train.gradient_accumulation_steps,
            run.train.gradient_clipping,
            run.train.precision == "bf16",
            num_trainable(shapes),
        )
        resolved = resolve_deepspeed_config(raw, numbers, source=run.deepspeed_config, run_file=run_file)
        init_distributed(launch)
    return Prepared(run, launch, labels, tokenizer, resolved, device_of(launch))


def prepare_single(run: RunConfig, checkpoint: Checkpoint) -> Prepared:
    """The same for one process without DeepSpeed, whatever the run trained on, to read a checkpoint of it."""
    launch = LaunchEnvironment(0, 1, 0)
    return Prepared(run, launch, checkpoint.state.labels, load_tokenizer(run), None, device_of(launch))


def build(prepared: Prepared, checkpoint: Checkpoint | None = None) -> tuple[BuiltModel, Engine]:
    """The run's model, with the values of ``checkpoint`` if given, in its engine. Collective."""
    run, ds_config = prepared.run, prepared.ds_config
    partitioned = zero_stage(ds_config) == 3
    built = build_model(run, prepared.labels, prepared.tokenizer, zero3_config=ds_config if partitioned else None)
    if checkpoint is not None:
        load_into(built.module, checkpoint)
    if ds_config is None:
        built.module.to(prepared.device)
    engine = build_engine(
        built.module,
        parameter_groups(built.module, run),
        ds_config=ds_config,
        gradient_accumulation_steps=run.train.gradient_accumulation_steps,
        gradient_clipping=run.train.gradient_clipping,
    )
    return built, engine


def train_run(prepared: Prepared, *, quiet: bool = False) -> dict[str, Any]:
    """Train, evaluate and save; the result, as written to result.json. Collective."""
    run = prepared.run
    folder = Path(run.output_dir)
    examples = prepared.load("train")
    validation = prepared.load("validation") if run.data.validation else None
    num_steps = run.num_steps(len(examples))
    schedule = run.make_schedule(num_steps)
    _, engine = build(prepared)
    if is_main():
        _start_folder(folder, prepared)
    barrier()
    metrics = MetricsWriter(folder, num_steps=num_steps, is_main=is_main(), quiet=quiet)
    keeper = _Keeper(prepared, engine, schedule, validation, metrics, num_steps)
    try:
        state = training.train(
            training.Loop(
                run, engine, schedule, examples, prepared.tokenizer, num_steps, prepared.device, metrics,
                keeper.after_step,
            )
        )  # fmt: skip
        final = keeper.finish(state)
    finally:
        metrics.close()
    result = {
        "task": run.task,
        "method": run.method,
        "steps": state.step,
        "skipped_steps": engine.skipped_steps,
        "world_size": world_size(),
        "sparsity_asked": schedule.sparsity_at(num_steps) if schedule else 0.0,
        "sparsity_in_masks": state.masks.sparsity if state.masks else 0.0,
        "mask_checksum": state.masks.checksum if state.masks else "",
        "trained_parameters": num_trainable(engine.module),
        "optimizer_bytes_per_rank": optimizer_bytes(engine),
        "metrics": final,
        "best_step": keeper.best_step,
        "seconds": round(metrics.seconds, 1),
    }
    if is_main():
        (folder / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    barrier()
    return result


class _Keeper:
    """Evaluates and saves on the way: the best checkpoint among those at the final sparsity, and the last."""

    def __init__(
        self,
        prepared: Prepared,
        engine: Engine,
        schedule: Any,
        validation: ExampleSet | None,
        metrics: MetricsWriter,
        num_steps: int,
    ):
        self._prepared, self._engine, self._schedule = prepared, engine, schedule
        self._validation, self._metrics, self._num_steps = validation, metrics, num_steps
        self._folder = Path(prepared.run.output_dir) / "checkpoints"
        self._fingerprint = base_fingerprint(prepared.run.model.path)
        self._best: float | None = None
        self.best_step: int | None = None
        self._last_evaluated: tuple[int, dict[str, float]] = (-1, {})

    def after_step(self, state: training.LoopState) -> None:
        interval = self._prepared.run.eval.interval
        if interval and state.step % interval == 0 and self._validation is not None:
            self._evaluate(state)

    def finish(self, state: training.LoopState) -> dict[str, float]:
        """The last evaluation and checkpoint; returns the metrics."""
        step, values = self._last_evaluated
        if step != state.step and self._validation is not None:
            values = self._evaluate(state)
        self._save("final", state.step, values)
        return values

    def _evaluate(self, state: training.LoopState) -> dict[str, float]:
        assert self._validation is not None
        run = self._prepared.run
        values = evaluate(self._engine, self._validation, self._prepared)
        self._engine.train()
        self._metrics.write(state.step, {"event": "evaluation", **{f"eval/{k}": v for k, v in values.items()}})
        self._metrics.progress(state.step, {f"eval {k}": v for k, v in values.items()})
        self._last_evaluated = (state.step, values)
        at_final_sparsity = self._schedule is None or self._schedule.is_final(state.step)
        if at_final_sparsity and self._is_best(values[run.metric]):
            self._best, self.best_step = values[run.metric], state.step
            self._save("best", state.step, values)
        return values

    def _is_best(self, value: float) -> bool:
        if self._best is None:
            return True
        return value < self._best if self._prepared.task.lower_is_better else value > self._best

    def _save(self, name: str, step: int, values: dict[str, float]) -> None:
        run, module = self._prepared.run, self._engine.module
        state = CheckpointState(
            step=step,
            sparsity=self._schedule.sparsity_at(step) if self._schedule else 0.0,
            masks_final=self._schedule is None or self._schedule.is_final(step),
            precision=run.train.precision,
            device_type=self._prepared.device.partition(":")[0],
            base_path=run.model.path,
            base_fingerprint=self._fingerprint,
            labels=self._prepared.labels,
            weight_scales=weight_scales(module),
            metrics=values,
        )
        save_checkpoint(self._folder / name, module, state)


def evaluate(engine: Engine, examples: ExampleSet, prepared: Prepared) -> dict[str, float]:
    """Metrics of the engine's model on ``examples``. Collective; leaves the engine in evaluation mode."""
    engine.eval()
    task, batch_size = prepared.task, prepared.run.eval_batch_size
    outcomes = predict(engine, task, examples, prepared.tokenizer, batch_size, prepared.device)
    return task.metrics(outcomes, examples)


def open_checkpoint(run: RunConfig, name: str) -> Checkpoint:
    """A checkpoint of the run's folder: "best" (falling back to "final" when none was chosen), or another by name.

    Raises CheckpointError, also when the base model is not the one that was trained.
    """
    folder = Path(run.output_dir) / "checkpoints"
    if name == "best" and not (folder / "best").is_dir():
        name = "final"
    checkpoint = read_checkpoint(folder / name)
    found = base_fingerprint(run.model.path)
    if found != checkpoint.state.base_fingerprint:
        raise ConfigError(
            f"model.path = {run.model.path!r} is not the base model that {checkpoint.folder} was trained from (its "
            "fingerprint differs); point --set model.path= at the right one"
        )
    return checkpoint


def masked_model(prepared: Prepared, checkpoint: Checkpoint) -> nn.Module:
    """The model as it was trained, PST modules and all, in evaluation mode on one process."""
    built = build_model(prepared.run, prepared.labels, prepared.tokenizer, zero3_config=None)
    load_into(built.module, checkpoint)
    return built.module.to(prepared.device).eval()


def _start_folder(folder: Path, prepared: Prepared) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    if checkpoints.is_dir():  # an earlier run's best would pass for this one's
        previous = folder / "checkpoints.previous"
        shutil.rmtree(previous, ignore_errors=True)
        checkpoints.rename(previous)
        print(f"{checkpoints} of an earlier run is now {previous}")
    (folder / RUN_FILE).write_text(dump_run(prepared.run), encoding="utf-8")
    if prepared.ds_config is not None:
        text = json.dumps(prepared.ds_config, indent=1) + "\n"
        (folder / "deepspeed.json").write_text(text, encoding="utf-8")
