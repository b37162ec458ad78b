"""Losses of a dense run on the same task and data, shown next to a run's losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pst_ds.checkpoint.format import MANIFEST
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.toml import load_run_folder
from pst_ds.errors import InputError
from pst_ds.file_names import CHECKPOINTS, METRICS_FILE, RUN_FILE, step_folders
from pst_ds.train.monitor.curves import DENSE, EVALUATION, Point, batch_losses, read_curves

_PLACES = ("model.path", "data.train", "data.validation")
_SAME = (
    "task",
    *_PLACES,
    "data.dataset",
    "data.subset",
    "data.revision",
    "data.text_columns",
    "data.label_column",
    "data.separator",
    "data.sample_by",
    "data.max_length",
    "train.batch_size",
)
"""Settings without which a step of one run is not a step of the other, or a loss not the same loss."""


@dataclass(frozen=True, slots=True)
class DenseRun:
    """The losses of a dense run."""

    training: list[Point]
    """Of each batch. Empty where it minimised another loss than the run."""
    validation: list[Point]
    validation_name: str
    """The curve that ``validation`` is, such as "eval/loss"."""
    digest: str
    """Of its training text, if a checkpoint is left that says so."""

    def training_loss(self, step: int, batches: int = 1) -> float | None:
        """Return its mean loss over as many batches up to ``step``; None if it did not go that far."""
        if not self.training or step > self.training[-1][0]:
            return None
        inside = [value for at, value in self.training if step - batches < at <= step]
        return float(np.mean(inside)) if inside else _between(self.training, step)

    def validation_loss(self, step: int) -> float | None:
        """Return its validation loss after ``step``, on a line between two evaluations; None outside of them."""
        if not self.validation or not self.validation[0][0] <= step <= self.validation[-1][0]:
            return None
        return _between(self.validation, step)

    def at(self, step: int, values: Mapping[str, object]) -> dict[str, float]:
        """Return the losses that belong next to those in a line of metrics.jsonl, by name."""
        found = {}
        if "loss" in values:
            found[f"loss{DENSE}"] = self.training_loss(step, _count(values.get("losses")))
        if self.validation_name in values:
            found[f"{self.validation_name}{DENSE}"] = self.validation_loss(step)
        return {name: value for name, value in found.items() if value is not None}

    def require_text(self, run: RunConfig, digest: str) -> None:
        """Raise ConfigError when it trained on another text than that with ``digest``."""
        if self.digest not in ("", digest):
            raise ConfigError(
                f"dense_run = {run.dense_run!r} trained on another text: the tokens or labels of "
                f"{run.data.trained_on} differ. Fix: train the dense run again, or leave dense_run out"
            )


def read_dense_run(run: RunConfig) -> DenseRun | None:
    """Read the dense run that ``run`` names, if it names one. Raises ConfigError when it cannot be compared."""
    if not run.dense_run:
        return None
    folder = Path(run.dense_run)
    where = f"dense_run = {run.dense_run!r}"
    missing = next((name for name in (RUN_FILE, METRICS_FILE) if not (folder / name).is_file()), None)
    if missing:
        raise ConfigError(
            f"{where} is not a run folder: {missing} is missing (looked in {folder.absolute()}); name the output_dir "
            "of a dense run, or leave it out"
        )
    try:
        other = load_run_folder(folder)
    except InputError as error:
        raise ConfigError(f"{where}: {error}") from None
    if other.mask_method.masks != "none":
        raise ConfigError(
            f'{where} has method = {other.method!r}, which prunes; name a run of method "dense" or "lora"'
        )
    for name in _SAME:
        ours, theirs = _setting(run, name), _setting(other, name)
        if not _are_same(name, ours, theirs):
            raise ConfigError(
                f"{where} has {name} = {theirs!r}, and this run {ours!r}: their losses cannot be compared step by "
                "step. Fix: name a dense run that differs only in what is trained, or remove it"
            )
    name = f"{EVALUATION}{run.task_facts.loss}"
    validation = read_curves(folder / METRICS_FILE).get(name, [])
    is_same_loss = run.distillation == other.distillation
    training = batch_losses(folder / METRICS_FILE) if is_same_loss else []
    return DenseRun(training, validation, name, _digest(folder))


def _between(points: Sequence[Point], step: int) -> float:
    steps, values = np.array(points).T
    return float(np.interp(step, steps, values))


def _count(losses: object) -> int:
    return len(losses) if isinstance(losses, list) else 1


def _setting(run: RunConfig, name: str) -> Any:
    value: Any = run
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _are_same(name: str, ours: Any, theirs: Any) -> bool:
    if name == "data.validation" and not (ours and theirs):
        return True
    return bool(ours == theirs) or (name in _PLACES and Path(ours).resolve() == Path(theirs).resolve())


def _digest(folder: Path) -> str:
    """Return the digest of the text that a run trained on, by its newest checkpoint; empty without a readable one."""
    for path in step_folders(folder / CHECKPOINTS):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            return str(manifest["state"]["progress"]["data_digest"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ""
