"""Decide whether a run overfits or underfits, from its losses, and propose settings to change.

The noise of a loss is estimated from its own curve. Training losses are independent between batches, so their residuals
from a trend are noise. Validation losses are few, so their noise is the distance of each from the line through its
neighbours. Only losses under the final masks are compared. Importing this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
ERRORS = 3.0
"""Standard errors above which a change is more than noise."""
STEEP = 0.1
"""A run underfits if twice the steps would lower its loss by this share."""
UNLEARNED, NOT_LEARNED = 0.4, 0.9
"""Shares of a constant answer's loss: below the first, a run has learned enough; above the second, nothing."""
RISE = 0.1
"""Share by which the validation loss of a run that overfits ends above its minimum."""
FEWEST_BATCHES, FEWEST_EVALUATIONS = 8, 3
"""Minimum numbers of points for a trend."""
END = 0.1
"""Last share of the steps, over which the loss at the end is averaged."""

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

    @property
    def end(self) -> float:
        """Mean training loss over the last END of the steps, at least over FEWEST_BATCHES batches."""
        steps = self.num_steps
        last = [value for step, value in self.training if (1.0 - END) * steps < step <= steps]
        few = [value for _, value in self.training[-FEWEST_BATCHES:]]
        return float(np.mean(last if len(last) >= FEWEST_BATCHES else few))

    @property
    def second_half(self) -> float:
        """First step of the second half, or with the final masks if that is later."""
        return max(self.masks_final, self.num_steps / 2)

    @property
    def half_learned(self) -> float:
        """Step before and after which the learning rates, summed over :attr:`second_half`, are equal."""
        return self.num_steps - (self.num_steps - self.second_half) / math.sqrt(2.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Underfitting or overfitting of a run."""

    kind: Literal["underfits", "overfits"]
    reason: str
    """Clause with the numbers."""
    best_step: int | None = None
    """Step of the lowest validation loss of a run that overfits, if it was measured."""
    is_slow: bool = False
    """True if a run that underfits has learned nothing, so its rates are too low."""


@dataclass(frozen=True, slots=True)
class Trend:
    """The slope of a loss and its standard error."""

    slope: float
    error: float

    @property
    def falls(self) -> bool:
        return self.slope < -ERRORS * self.error

    @property
    def per_doubling(self) -> float:
        """Decrease for twice the steps, for a slope in ln(step)."""
        return -self.slope * math.log(2.0)


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

    Losses are means over the last tenth of the steps (training) and of the last evaluation; None if not measured.
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
        "training_loss": losses.end if training else None,
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


def trend(points: Sequence[Point], since: float, scale: Callable[[float], float] = math.log) -> Trend | None:
    """Fit a + b scale(step) to the points from step ``since`` on; return b with its standard error.

    None for fewer than FEWEST_EVALUATIONS points, or points of one step.
    """
    chosen = [(scale(step), value) for step, value in points if step >= max(since, 1)]
    if len(chosen) < FEWEST_EVALUATIONS:
        return None
    x, y = np.array(chosen).T
    x -= x.mean()
    spread = float(x @ x)
    if spread == 0.0:
        return None
    slope = float(x @ y) / spread
    residuals = y - y.mean() - slope * x
    return Trend(slope, math.sqrt(float(residuals @ residuals) / (len(x) - 2) / spread))


def noise(points: Sequence[Point]) -> float:
    """Return the standard deviation of a curve of few points from a smooth one, robust to a single turn; 0 for fewer
    than three."""
    distances = []
    for (x0, y0), (x1, y1), (x2, y2) in zip(points, points[1:], points[2:], strict=False):
        right = (x1 - x0) / (x2 - x0)
        distances.append(abs(y1 - right * y2 - (1 - right) * y0) / math.sqrt(1 + right**2 + (1 - right) ** 2))
    return 1.4826 * sorted(distances)[(len(distances) - 1) // 2] if distances else 0.0  # 1 / the quartile of a normal


def judge(losses: Losses) -> Verdict | None:
    """Return what is wrong with a run; None if nothing is, or too little was measured to tell."""
    if len(losses.training) < FEWEST_BATCHES:
        return None
    found = _overfitting(losses)
    if found is None and losses.is_same_loss:
        return _underfitting(losses)
    return found or _underfitting_by_validation(losses)


def _overfitting(losses: Losses) -> Verdict | None:
    if not losses.validation:
        return None
    last, constant = losses.validation[-1][1], losses.constant
    points = [point for point in losses.validation if point[0] >= losses.masks_final]
    best_step, lowest = min(points, key=lambda point: point[1], default=(None, last))
    if best_step is not None and len(points) >= FEWEST_EVALUATIONS:
        rises = last - lowest > max(RISE * lowest, ERRORS * noise(points))
        if rises and _fits_closer(losses, best_step, last) and not _metric_gained(losses, best_step):
            return Verdict(
                "overfits",
                f"the validation loss rose from {lowest:.3g} after step {best_step} to {last:.3g}, with a training "
                f"loss of {losses.end:.3g} at the end",
                best_step,
            )
    if constant is None or not losses.is_same_loss:
        return None
    if last > (1.0 + RISE) * constant and losses.end < 0.5 * constant:
        return Verdict(
            "overfits",
            f"the validation loss is {last:.3g}, above the {constant:.3g} of always giving the same answer, with "
            f"a training loss of {losses.end:.3g}",
            best_step if (best_step, lowest) != losses.validation[-1] else None,
        )
    return None


def _fits_closer(losses: Losses, since: int, validation: float) -> bool:
    """Return whether the training loss fell after step ``since``, or is far below the validation loss already."""
    found = trend(losses.training, since)
    return (found is not None and found.falls) or (losses.is_same_loss and losses.end < 0.5 * validation)


def _metric_gained(losses: Losses, since: int) -> bool:
    """Return whether the metric ended better than at any step up to ``since``. Then a higher loss does no harm."""
    before = [value for step, value in losses.metric if losses.masks_final <= step <= since]
    return bool(before) and losses.metric[-1][1] > max(before)


def _underfitting(losses: Losses) -> Verdict | None:
    end, constant = losses.end, losses.constant
    if constant is not None and end > NOT_LEARNED * constant:
        count = max(FEWEST_BATCHES, round(END * len(losses.training)))
        values = [value for _, value in losses.training]
        if np.convolve(values, np.full(count, 1.0 / count), mode="valid").min() < NOT_LEARNED * constant:
            return None  # it had learned, and lost it to the pruning or to high rates: more of either would not help
        return Verdict(
            "underfits",
            f"the training loss is {end:.3g} at the end, and always giving the same answer has {constant:.3g}",
            is_slow=True,
        )
    found = trend(losses.training, losses.second_half)
    if found is None or not _falls_to_the_end(losses):
        return None
    is_far = constant is None or end > UNLEARNED * constant
    if not is_far or found.per_doubling < STEEP * end or not _validation_agrees(losses):
        return None
    return Verdict("underfits", _still_falling("training", end, found))


def _falls_to_the_end(losses: Losses) -> bool:
    """Return whether the training loss falls in the second half of the steps, and at least half as fast in its second
    half: recovery from the last pruning ends. Time is the remaining sum of the rates, which fall to zero."""
    steps, training, late = losses.num_steps, losses.training, losses.half_learned
    if sum(step >= late for step, _ in training) < FEWEST_BATCHES:
        return False
    starts = (losses.second_half, late)
    whole, half = (trend(training, start, lambda step: -((1.0 - step / steps) ** 2)) for start in starts)
    return bool(whole and half and whole.falls and half.falls and half.slope < whole.slope / 2)


def _validation_agrees(losses: Losses) -> bool:
    """Return whether validation, if measured, does not contradict that more training would help."""
    if not losses.validation:
        return True
    last = losses.validation[-1][1]
    found = trend(losses.validation, losses.half_learned) or trend(losses.validation, losses.second_half)
    if found is not None:
        return found.per_doubling > STEEP / 2 * last
    return losses.epochs <= 1.0 or last < (1.0 + 2 * RISE) * losses.end


def _underfitting_by_validation(losses: Losses) -> Verdict | None:
    """Judge a run with a teacher by its validation loss, because its training loss has no scale."""
    found, constant = trend(losses.validation, losses.second_half), losses.constant
    if found is None:
        return None
    last = losses.validation[-1][1]
    late = trend(losses.validation, losses.half_learned) or found
    learned = constant is not None and last < UNLEARNED * constant
    if learned or not found.falls or min(found.per_doubling, late.per_doubling) < STEEP * last:
        return None
    return Verdict("underfits", _still_falling("validation", last, found))


def _still_falling(which: str, end: float, found: Trend) -> str:
    share = found.per_doubling / end
    return f"the {which} loss is {end:.3g} at the end and still falls, by {share:.0%} for twice the steps"


def sentence(fit: object) -> str:
    """Return the ``fit`` of a result.json as a sentence; empty without a verdict, or for anything else."""
    if not isinstance(fit, dict) or not fit.get("verdict"):
        return ""
    found = fit.get("fixes")
    changes = [fix for fix in found if isinstance(fix, dict)] if isinstance(found, list) else []
    fixes = "; or ".join(", ".join(f"{name} = {value}" for name, value in fix.items()) for fix in changes)
    more = " More training data helps too." if fit["verdict"] == "overfits" else ""
    return f"The run {fit['verdict']}: {fit.get('reason')}. Fix: {fixes}.{more}"
