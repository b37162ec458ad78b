"""Losses of a dense run on the same task and data, shown next to a run's losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

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
"""Settings that must be equal for steps and losses of two runs to be comparable."""


@dataclass(frozen=True, slots=True)
class DenseRun:
    """Losses of a dense run."""

    training: list[Point]
    """Loss of each batch; empty if it minimised another loss than the run."""
    validation: list[Point]
    validation_name: str
    """Name of the curve ``validation``, such as "eval/loss"."""

    def training_loss(self, step: int, batches: int = 1) -> float | None:
        """Return the mean loss of ``batches`` batches up to ``step``; None after its last step."""
        if not self.training or step > self.training[-1][0]:
            return None
        inside = [value for at, value in self.training if step - batches < at <= step]
        return float(np.mean(inside)) if inside else _between(self.training, step)

    def validation_loss(self, step: int) -> float | None:
        """Return the validation loss after ``step``, interpolated linearly; None outside of its evaluations."""
        if not self.validation or not self.validation[0][0] <= step <= self.validation[-1][0]:
            return None
        return _between(self.validation, step)

    def at(self, step: int, values: Mapping[str, object]) -> dict[str, float]:
        """Return the dense losses for a line of metrics.jsonl, by name."""
        found = {}
        if "loss" in values:
            losses = values.get("losses")
            found[f"loss{DENSE}"] = self.training_loss(step, len(losses) if isinstance(losses, list) else 1)
        if self.validation_name in values:
            found[f"{self.validation_name}{DENSE}"] = self.validation_loss(step)
        return {name: value for name, value in found.items() if value is not None}


def read_dense_run(run: RunConfig, digest: str | None = None) -> DenseRun | None:
    """Read the dense run in ``run.dense_run``; None if that is empty. Raises ConfigError if it cannot be compared.

    ``digest``: digest of the run's training data, to compare it with that of the dense run's newest checkpoint.
    """
    if not run.dense_run:
        return None
    folder = Path(run.dense_run)
    where = f"dense_run = {run.dense_run!r}"
    missing = next((name for name in (RUN_FILE, METRICS_FILE) if not (folder / name).is_file()), None)
    if missing:
        raise ConfigError(
            f"{where} is not a run folder: {missing} is missing (looked in {folder.absolute()}). Name the output_dir "
            "of a dense run, or remove the setting"
        )
    try:
        other = load_run_folder(folder)
    except InputError as error:
        raise ConfigError(f"{where}: {error}") from None
    if other.mask_method.masks != "none":
        raise ConfigError(
            f'{where} has method = {other.method!r}, which prunes. Name a run of method "dense" or "lora"'
        )
    for name in _SAME:
        ours, theirs = attrgetter(name)(run), attrgetter(name)(other)
        is_same = ours == theirs or (name in _PLACES and Path(ours).resolve() == Path(theirs).resolve())
        if not is_same and (name != "data.validation" or (ours and theirs)):
            raise ConfigError(
                f"{where} has {name} = {theirs!r}, and this run {ours!r}: their losses cannot be compared step by "
                "step. Name a dense run that differs only in what is trained, or remove it"
            )
    if digest is not None and _digest(folder) not in ("", digest):
        raise ConfigError(
            f"{where} trained on another text: the tokens or labels of {run.data.trained_on} differ. Train the dense "
            "run again, or remove dense_run"
        )
    name, metrics = f"{EVALUATION}{run.task_facts.loss}", folder / METRICS_FILE
    training = batch_losses(metrics) if run.distillation == other.distillation else []
    return DenseRun(training, read_curves(metrics).get(name, []), name)


def _between(points: Sequence[Point], step: int) -> float:
    steps, values = np.array(points).T
    return float(np.interp(step, steps, values))


def _digest(folder: Path) -> str:
    """Return the digest of a run's training data from its newest readable checkpoint; empty without one."""
    for path in step_folders(folder / CHECKPOINTS):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            return str(manifest["state"]["progress"]["data_digest"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return ""
