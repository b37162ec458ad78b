"""The state, besides tensors, that a run continues from, and the check that it is still the same run."""

from __future__ import annotations

import json
from copy import copy
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
"""Settings that may differ when a run continues: paths, how the same numbers are computed, and what the digest of the
examples covers."""
_MAY_BE_CHANGED = (
    "train.score_learning_rate", "train.update_learning_rate", "train.embedding_learning_rate",
    "train.head_learning_rate", "train.gradient_clipping",
)  # fmt: skip
"""Settings that a user may want to change to get over a divergence; a message says so."""

_SHARED = ("batch", "losses", "tokens", "last_report_seconds", "skipped_in_a_row")
"""Fields that LoopState and RunProgress have in common."""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Where a run is, as JSON values; the same on every rank, and for any number of them.

    The random numbers of a step and the order of the batches follow from the seed and ``batch``, and the learning rates
    from the step, so none of these are saved.
    """

    batch: int
    """Global batches taken."""
    skipped_steps: int
    skipped_in_a_row: int
    losses: list[float]
    """Losses of the global batches since the last line of metrics.jsonl."""
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
        """Read the progress of ``checkpoint``. Raises CheckpointError when it has none, or an unknown one."""
        try:
            return cls(**checkpoint.state.progress)
        except TypeError as error:
            raise CheckpointError(f"{checkpoint.folder} was not written to continue a run: {error}") from None


def require_same_run(checkpoint: Checkpoint, run: RunConfig, fingerprint: str, data_digest: str) -> list[str]:
    """Raise ConfigError when ``run`` is not the run of ``checkpoint``; return the permitted changes, as text."""
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
    """Return ``run`` as JSON values, with the seed that its factors follow."""
    return json.loads(json.dumps(asdict(replace(run, pst=run.seeded_pst))))


def flat_table(run: RunConfig) -> dict[str, Any]:
    """Return the settings of ``run`` as JSON values, by their dotted names."""
    return flatten(as_table(run))


def progress_of(run: RunConfig, engine: Engine, state: LoopState, **more: Any) -> RunProgress:
    """Return the progress of ``run`` at ``state``; ``more``: the fields that neither ``engine`` nor ``state`` has."""
    groups = {
        group["name"]: {"lr": group["lr"], "peak_lr": group["peak_lr"], "betas": list(group["betas"])}
        for group in engine.optimizer.param_groups
    }
    return RunProgress(
        skipped_steps=engine.skipped_steps,
        masks=state.masks.totals() if state.masks else None,
        groups=groups,
        run=as_table(run),
        **{name: copy(getattr(state, name)) for name in _SHARED},
        **more,
    )


def restore(engine: Engine, checkpoint: Checkpoint, run: RunConfig) -> LoopState:
    """Restore the optimizer, and return the state that the loop continues from. Collective.

    The model must have the checkpoint's values already. Raises CheckpointError when its masks are not those saved.
    """
    progress, step = RunProgress.read(checkpoint), checkpoint.state.step
    load_optimizer(engine, checkpoint)
    accumulation = run.train.gradient_accumulation_steps
    set_counters(engine, applied=step, skipped=progress.skipped_steps, accumulation=accumulation)
    masks = None
    if progress.masks is not None:
        masks = MaskStats(**progress.masks)
        checksum = mask_stats(engine.module).checksum
        if checksum != masks.checksum:
            raise CheckpointError(
                f"{checkpoint.folder}: the masks have checksum {checksum} in the model, and had {masks.checksum} when "
                "they were saved"
            )
    return LoopState(step=step, masks=masks, **{name: copy(getattr(progress, name)) for name in _SHARED})
