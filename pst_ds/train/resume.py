"""What continuing a run takes beside its tensors, and whether the run that continues is the same one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from pst_ds.checkpoint.format import Checkpoint, CheckpointError
from pst_ds.checkpoint.restore import load_optimizer, same_base
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.toml import flatten
from pst_ds.masks.update import MaskStats, mask_stats
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.optimizer_state import set_counters
from pst_ds.train.loop import LoopState

_MAY_DIFFER = (
    "output_dir", "deepspeed_config", "model.path", "model.tokenizer", "model.attn_implementation",
    "model.gradient_checkpointing", "model.gradient_checkpointing_reentrant", "data.train", "data.validation",
    "data.test", "data.label_names", "train.gradient_accumulation_steps", "train.log_interval",
    "train.stall_timeout_seconds", "eval.interval", "eval.batch_size", "checkpoint.interval", "checkpoint.keep_last",
    "pst.prune_uncalled", "pst.tile_bytes", "pictures.interval", "pictures.layers",
)  # fmt: skip
"""Settings that a run may be continued with other values of: places, how the same numbers are computed, and what the
digest of the examples tells."""
_MAY_BE_CHANGED = (
    "train.score_learning_rate", "train.update_learning_rate", "train.embedding_learning_rate",
    "train.head_learning_rate", "train.gradient_clipping",
)  # fmt: skip
"""Settings that a user may want to change on the way, to get over a divergence; it is said."""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Where a run is, as JSON values; the same on every rank, and for any number of them.

    The random numbers of a step and the order of the batches are functions of the seed and ``batch``, and the
    learning rates of the step, so these few numbers place all of them.
    """

    batch: int
    """Global batches taken."""
    skipped_steps: int
    skipped_in_a_row: int
    losses: list[float]
    """Of the global batches since the last line of metrics.jsonl."""
    tokens: int
    seconds: float
    last_report_seconds: float
    masks: dict[str, Any] | None
    """Totals of the last update, see MaskStats."""
    groups: dict[str, dict[str, float]]
    """Learning rate, its peak, and Adam's betas of each parameter group."""
    best_step: int | None
    best_value: float | None
    evaluated_step: int
    data_digest: str
    run: dict[str, Any]
    """The resolved run file."""
    world_size: int
    zero_stage: int

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> RunProgress:
        """Raises CheckpointError when a checkpoint has none, or not this one."""
        try:
            return cls(**checkpoint.state.progress)
        except TypeError as error:
            raise CheckpointError(f"{checkpoint.folder} was not written to continue a run: {error}") from None


def require_same_run(checkpoint: Checkpoint, run: RunConfig, fingerprint: str, data_digest: str) -> list[str]:
    """Raise ConfigError when ``run`` is not the run of ``checkpoint``; returns what is allowed to differ, and does."""
    progress = RunProgress.read(checkpoint)
    require_base(checkpoint, run.model.path, fingerprint)
    before, now = flatten(progress.run), flat_table(run)
    changed = [key for key in now | before if before.get(key) != now.get(key)]  # pst.seed after the seed it may follow
    for key in changed:
        if key not in _MAY_DIFFER and key not in _MAY_BE_CHANGED:
            raise ConfigError(
                f"{key} = {now.get(key)!r}, but the run in {checkpoint.folder} has {before.get(key)!r}, and a run goes "
                "on only as it began. Fix: take the old value, or start a new run in another output_dir"
            )
    if data_digest != progress.data_digest:
        raise ConfigError(
            f"data.train = {run.data.train!r} is not the text that the run in {checkpoint.folder} began with (its "
            "tokens or labels differ), so the batches would be others. Fix: bring the old file back, or start a new "
            "run in another output_dir"
        )
    return [f"{key} = {now[key]!r} (was {before[key]!r})" for key in changed if key in _MAY_BE_CHANGED]


def require_base(checkpoint: Checkpoint, path: str, fingerprint: str) -> None:
    """Raise ConfigError unless ``fingerprint``, of the model at ``path``, is that of the checkpoint's base model."""
    if not same_base(fingerprint, checkpoint.state.base_fingerprint):
        raise ConfigError(
            f"model.path = {path!r} is not the base model that {checkpoint.folder} was trained from (its fingerprint "
            "differs); point --set model.path= at the right one"
        )


def as_table(run: RunConfig) -> dict[str, Any]:
    """``run`` as JSON values, with the seed of the factors that counts."""
    return _plain(asdict(replace(run, pst=run.seeded_pst)))


def flat_table(run: RunConfig) -> dict[str, Any]:
    """The settings of ``run`` as JSON values, by their dotted names."""
    return flatten(as_table(run))


def progress_of(run: RunConfig, engine: Engine, state: LoopState, **more: Any) -> RunProgress:
    """Where ``run`` is after ``state``; ``more``: the fields that its engine and ``state`` do not tell."""
    groups = {
        group["name"]: {"lr": group["lr"], "peak_lr": group["peak_lr"], "betas": list(group["betas"])}
        for group in engine.optimizer.param_groups
    }
    return RunProgress(
        batch=state.batch,
        skipped_steps=engine.skipped_steps,
        skipped_in_a_row=state.skipped_in_a_row,
        losses=list(state.losses),
        tokens=state.tokens,
        last_report_seconds=state.last_report_seconds,
        masks=state.masks.totals() if state.masks else None,
        groups=groups,
        run=as_table(run),
        **more,
    )


def restore(engine: Engine, checkpoint: Checkpoint, run: RunConfig) -> LoopState:
    """Put the optimizer back where it was, and the state that the loop goes on from. Collective.

    The model has the checkpoint's values already. Raises CheckpointError when its masks are not those that were saved.
    """
    progress, step = RunProgress.read(checkpoint), checkpoint.state.step
    load_optimizer(engine, checkpoint)
    set_counters(
        engine, applied=step, skipped=progress.skipped_steps, accumulation=run.train.gradient_accumulation_steps
    )
    masks = None
    if progress.masks is not None:
        masks = MaskStats(**progress.masks)
        found = mask_stats(engine.module)
        if found.checksum != masks.checksum:
            raise CheckpointError(
                f"{checkpoint.folder}: the masks have checksum {found.checksum} in the model, and had {masks.checksum} "
                "when they were saved"
            )
    return LoopState(
        step=step,
        batch=progress.batch,
        masks=masks,
        losses=list(progress.losses),
        tokens=progress.tokens,
        last_report_seconds=progress.last_report_seconds,
        skipped_in_a_row=progress.skipped_in_a_row,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
