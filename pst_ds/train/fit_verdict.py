"""Decide whether a run overfits or underfits, from its losses under the final masks, and propose settings to change.
Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pst_ds.config.run import RunConfig
from pst_ds.file_names import METRICS_FILE
from pst_ds.train.monitor.curves import EVALUATION, Point, batch_losses, read_curves

if TYPE_CHECKING:
    from pst_ds.core.schedule import Schedule
    from pst_ds.data.tasks import ExampleSet, Task

_MOST_WATCHED, _FEWEST_WATCHED = 4, 2
_SHARE_WATCHED = 0.05
"""Maximum share of a run's time for evaluations that only watch it; an example takes a third of its training time."""
CHANCE = 0.001
"""Probability below which a fall is more than noise."""
CHANGE = 0.1
"""Least share by which a loss falls or rises for a verdict."""
UNLEARNED, NOT_LEARNED = 0.4, 0.9
"""Shares of a constant answer's loss: below the first, a run has learned enough; above the second, nothing."""
FEWEST_BATCHES, FEWEST_EVALUATIONS = 8, 3

Change = dict[str, int | float]
"""Settings to change together, with their new values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The losses of a finished run, in order of steps."""

    training: Sequence[Point]
    """Training loss of each batch."""
    validation: Sequence[Point]
    num_steps: int
    masks_final: int
    """First step with the final masks."""
    epochs: float
    is_same_loss: bool
    """True if training minimised the validation loss; false with a teacher or a penalty in the loss."""
    constant: float | None = None
    """Loss of the best constant answer on the training data; None if it is not known."""
    metric: Sequence[Point] = ()
    """Metric that chooses the best checkpoint, at the steps of ``validation``; negated if lower is better."""

    def recent(self) -> list[float]:
        """Return moving means of the training loss, over a tenth of the batches and at least FEWEST_BATCHES."""
        count = max(FEWEST_BATCHES, len(self.training) // 10)
        return list(np.convolve([v for _, v in self.training], np.full(count, 1.0 / count), mode="valid"))


class Verdict(NamedTuple):
    kind: Literal["underfits", "overfits"]
    reason: str
    """Clause with the numbers."""
    best_step: int | None = None
    """Step of the lowest validation loss of a run that overfits, if it was measured."""
    is_slow: bool = False
    """True if a run that underfits has learned nothing, so its rates are too low."""


def watched_steps(
    run: RunConfig, schedule: Schedule | None, num_steps: int, training: int, validation: int
) -> set[int]:
    """Return steps with final masks at which to evaluate ``validation`` examples, to watch a run on ``training`` ones;
    none if the run file sets eval.interval, the data is read only once, or it takes too long."""
    trained = num_steps * run.train.batch_size
    if run.eval.interval or not validation or trained <= training:
        return set()
    count = min(_MOST_WATCHED, int(3 * _SHARE_WATCHED * trained / validation))
    if count < _FEWEST_WATCHED:
        return set()
    first = max(masks_final(schedule, num_steps), num_steps // (count + 1))
    return {first + (num_steps - first) * i // count for i in range(count)} - {0, num_steps}


def masks_final(schedule: Schedule | None, num_steps: int) -> int:
    """Return the first step from which on the masks do not change."""
    return next((s for s in range(num_steps) if schedule.is_final(s)), num_steps) if schedule else 0


def fit_of(run: RunConfig, task: Task, examples: ExampleSet, num_steps: int) -> dict[str, object]:
    """Judge a finished run on ``examples`` by its metrics.jsonl; return the ``fit`` of result.json.

    Losses are means over the last tenth of the batches (training) and of the last evaluation; None if not measured.
    """
    path = Path(run.output_dir) / METRICS_FILE
    training, curves = batch_losses(path, num_steps), read_curves(path)
    validation, metric = (curves.get(f"{EVALUATION}{name}", []) for name in (run.task_facts.loss, run.metric))
    losses = Losses(
        training=training,
        validation=validation,
        num_steps=num_steps,
        masks_final=masks_final(run.make_schedules(num_steps).masks, num_steps),
        epochs=num_steps * run.train.batch_size / len(examples),
        is_same_loss=not run.distillation.weight,
        constant=task.constant_loss(examples),
        metric=[(step, -value if task.lower_is_better else value) for step, value in metric],
    )
    found = judge(losses)
    return {
        "verdict": found.kind if found else None,
        "reason": found.reason if found else "",
        "fixes": fixes(run, found, num_steps) if found else [],
        "training_loss": losses.recent()[-1] if training else None,
        "validation_loss": validation[-1][1] if training and validation else None,
    }


def fixes(run: RunConfig, verdict: Verdict, num_steps: int) -> list[Change]:
    """Return changes of the run file that should each help separately, the most certain first."""
    overfits = verdict.kind == "overfits"
    factor = 0.5 if overfits else 2.0
    longer = verdict.best_step / num_steps if verdict.best_step else factor
    length: Change = {"train.num_epochs": float(f"{longer * run.train.num_epochs:.3g}")}
    if run.train.num_steps:
        length = {"train.num_steps": max(1, round(longer * run.train.num_steps))}
    rank = run.injected_pst.update_rank if run.mask_method.injects else 0
    names = ["update_learning_rate", "head_learning_rate"] if rank else ["head_learning_rate"]
    rates: Change = {f"train.{name}": float(f"{factor * getattr(run.train, name):.3g}") for name in names}
    found = [rates, length] if verdict.is_slow else [length, rates]
    if overfits:
        found.append({"model.dropout": min(0.5, max(0.1, 2 * (run.model.dropout or 0.0)))})
    if rank * factor >= 1:
        found.append({"pst.update_rank": round(factor * rank)})
    return found


def judge(losses: Losses) -> Verdict | None:
    """Return what is wrong with a run; None if nothing is, or too little was measured to tell."""
    if len(losses.training) < FEWEST_BATCHES:
        return None
    return _overfitting(losses) or (_underfitting(losses) if losses.is_same_loss else None)


def _overfitting(losses: Losses) -> Verdict | None:
    points = [point for point in losses.validation if point[0] >= losses.masks_final]
    if len(points) < FEWEST_EVALUATIONS:
        return None
    (best_step, lowest), end = min(points, key=lambda point: point[1]), losses.recent()[-1]
    last = min(value for _, value in points[-2:])  # one high value may be noise
    halves = np.array_split([value for step, value in losses.training if step >= best_step], 2)
    fits_closer = _falls(*halves) or (losses.is_same_loss and end < 0.5 * last)
    before = [value for step, value in losses.metric if losses.masks_final <= step <= best_step]
    gained = bool(before) and losses.metric[-1][1] > max(before)
    # with a better metric a higher loss does no harm, unless always giving the same answer has a lower one
    is_harmless = gained and (losses.constant is None or last < (1.0 + CHANGE) * losses.constant)
    if last < (1.0 + CHANGE) * lowest or not fits_closer or is_harmless:
        return None
    reason = f"the validation loss rose from {lowest:.3g} after step {best_step} to {points[-1][1]:.3g}"
    return Verdict("overfits", f"{reason}, with a training loss of {end:.3g} at the end", best_step)


def _underfitting(losses: Losses) -> Verdict | None:
    constant, recent, start = losses.constant, losses.recent(), max(losses.masks_final, losses.num_steps / 2)
    end, reason = recent[-1], f"the training loss is {recent[-1]:.3g} at the end"
    if constant is not None and end > NOT_LEARNED * constant:
        if min(recent) < NOT_LEARNED * constant:
            return None  # it had learned, and lost it to the pruning or to high rates: more of either would not help
        return Verdict("underfits", f"{reason}, and always giving the same answer has {constant:.3g}", is_slow=True)
    validation = [value for step, value in losses.validation if step >= start]
    if validation and losses.epochs > 1.0 and max(validation) < (1.0 + CHANGE / 2) * validation[-1]:
        return None  # more training would not help on other examples
    thirds = np.array_split([value for step, value in losses.training if step >= start], 3)
    if not _falls(thirds[0], thirds[2]) or (constant is not None and end < UNLEARNED * constant):
        return None
    first, middle, last = (float(third.mean()) for third in thirds)
    # a loss that only recovers from the last pruning has mostly done so after a third
    if first - last < CHANGE * last or middle - last < 0.2 * (first - last):
        return None
    return Verdict("underfits", f"{reason} and still falls, by {(first - last) / last:.0%} since step {round(start)}")


def _falls(before: np.ndarray, after: np.ndarray) -> bool:
    """Return whether the mean falls by more than noise."""
    from scipy.stats import ttest_ind

    return min(len(before), len(after)) > 1 and bool(ttest_ind(before, after, alternative="greater").pvalue < CHANCE)


def sentence(fit: object) -> str:
    """Return the ``fit`` of a result.json as a sentence; empty without a verdict, or for anything else."""
    if not isinstance(fit, dict) or not fit.get("verdict"):
        return ""
    found = fit.get("fixes")
    changes = [fix for fix in found if isinstance(fix, dict)] if isinstance(found, list) else []
    fixes = "; or ".join(", ".join(f"{name} = {value}" for name, value in fix.items()) for fix in changes)
    more = " More training data helps too." if fit["verdict"] == "overfits" else ""
    return f"The run {fit['verdict']}: {fit.get('reason')}. Fix: {fixes}.{more}"
