"""Decide whether a run overfits or underfits, from its losses, and propose settings to change.

The noise of a loss is estimated from its own curve: training losses are independent between batches, so their residuals
from a trend are noise; validation losses are few, so their noise is the distance of each from the line through its
neighbours. Only losses under the final masks are compared. Importing this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pst_ds.config.run import RunConfig
from pst_ds.file_names import METRICS_FILE
from pst_ds.train.monitor.curves import EVALUATION, Point, batch_losses, read_curves

if TYPE_CHECKING:
    from pst_ds.core.schedule import Schedule
    from pst_ds.data.tasks import ExampleSet, Task
    from pst_ds.train.monitor.dense_run import DenseRun

_MOST_WATCHED, _FEWEST_WATCHED = 4, 2
_SHARE_WATCHED = 0.05
"""Most of a run's time for evaluations that only watch it; one text costs a third of what it costs to train on."""
_EPOCH_END = 0.25
"""Share of a dense run's first epoch over which its loss at the end of that epoch is taken."""

Change = dict[str, int | float]
"""Settings to change together, with their new values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The ``fit`` of result.json. Losses are means over the last tenth of the steps (training) and of the last
    evaluation; None where there is none."""

    verdict: str | None
    """"underfits", "overfits", or None."""
    reason: str = ""
    fixes: tuple[Change, ...] = ()
    """Changes of which each helps by itself, the most certain first."""
    training_loss: float | None = None
    validation_loss: float | None = None
    dense_training_loss: float | None = None
    dense_validation_loss: float | None = None

    def as_table(self) -> dict[str, Any]:
        return {**asdict(self), "fixes": list(self.fixes)}


def watched_steps(
    run: RunConfig, schedule: Schedule | None, num_steps: int, training: int, validation: int
) -> set[int]:
    """Return the steps at which ``validation`` examples are evaluated to watch a run on ``training`` examples: where
    the run file leaves it open, the data is read more than once, and it is cheap; under the final masks."""
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


def fit_of(run: RunConfig, task: Task[Any], examples: ExampleSet, num_steps: int, dense: DenseRun | None) -> Fit:
    """Judge a run that has ended by its metrics.jsonl; ``examples``: those it trained on."""
    path = Path(run.output_dir) / METRICS_FILE
    training, curves = batch_losses(path, num_steps), read_curves(path)
    if not training:
        return Fit(verdict=None)
    validation, metric = (curves.get(f"{EVALUATION}{name}", []) for name in (run.task_facts.loss, run.metric))
    losses = Losses(
        training=training,
        validation=validation,
        num_steps=num_steps,
        masks_final=masks_final(run.make_schedules(num_steps).masks, num_steps),
        epochs=num_steps * run.train.batch_size / len(examples),
        is_same_loss=not run.distillation.weight,
        constant=task.constant_loss(examples),
        dense_first_epoch=_first_epoch(dense, len(examples) // run.train.batch_size),
        metric=[(step, -value if task.lower_is_better else value) for step, value in metric],
    )
    found = judge(losses)
    return Fit(
        verdict=found.kind if found else None,
        reason=found.reason if found else "",
        fixes=tuple(fixes(run, found, num_steps)) if found else (),
        training_loss=losses.end,
        validation_loss=losses.validation_end,
        dense_training_loss=dense.training_loss(num_steps, max(1, round(END * num_steps))) if dense else None,
        dense_validation_loss=dense.validation_loss(num_steps) if dense else None,
    )


def _first_epoch(dense: DenseRun | None, steps: int) -> float | None:
    """Return the training loss of a dense run at the end of its first epoch, of so many steps, or at its own end."""
    if dense is None or not dense.training:
        return None
    last = min(steps, dense.training[-1][0])
    inside: list[Point] = [point for point in dense.training if (1.0 - _EPOCH_END) * last < point[0] <= last]
    return end_loss(inside, last) if inside else None


def fixes(run: RunConfig, verdict: Verdict, num_steps: int) -> list[Change]:
    """Return changes of the run file of which each should help by itself, the most certain first."""
    if verdict.kind == "overfits":
        shorter = verdict.best_step / num_steps if verdict.best_step else 0.5
        dropout = min(0.5, max(0.1, 2 * (run.model.dropout or 0.0)))
        return [_length(run, shorter), _rates(run, 0.5), {"model.dropout": dropout}, *_rank(run, 0.5)]
    longer, faster = _length(run, 2.0), _rates(run, 2.0)
    first = [faster, longer] if verdict.is_slow else [longer, faster]
    return [*first, *_rank(run, 2.0)]


def _length(run: RunConfig, factor: float) -> Change:
    if run.train.num_steps:
        return {"train.num_steps": max(1, round(factor * run.train.num_steps))}
    return {"train.num_epochs": float(f"{factor * run.train.num_epochs:.3g}")}


def _rates(run: RunConfig, factor: float) -> Change:
    names = ["head_learning_rate"] if _rank_of(run) == 0 else ["update_learning_rate", "head_learning_rate"]
    return {f"train.{name}": float(f"{factor * getattr(run.train, name):.3g}") for name in names}


def _rank(run: RunConfig, factor: float) -> list[Change]:
    rank = _rank_of(run)
    return [{"pst.update_rank": round(factor * rank)}] if rank * factor >= 1 else []


def _rank_of(run: RunConfig) -> int:
    """Return the rank of the updates that train; 0 where none do."""
    return run.injected_pst.update_rank if run.mask_method.injects else 0


ERRORS = 3.0
"""Standard errors of a change that is more than noise."""
STEEP = 0.1
"""Share of its loss that a run would lose with twice the steps, if it went on as in its second half: it underfits."""
UNLEARNED, NOT_LEARNED = 0.4, 0.9
"""Shares of the loss of a constant answer. A run below the first has learned most of what there is, however its loss
still falls; one above the second has learned nothing."""
ABOVE_DENSE = 1.1
"""How many times the loss of a dense run's first epoch is far above it. Against a dense run half of STEEP is enough."""
RISE = 0.1
"""Share by which the validation loss of a run that overfits ends above its lowest."""
FEWEST_BATCHES, FEWEST_EVALUATIONS = 8, 3
"""A trend is not read from fewer."""
END = 0.1
"""Share of the steps over whose losses the loss at the end is taken."""

Kind = Literal["underfits", "overfits"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The losses of a run that has ended, in order of steps."""

    training: Sequence[Point]
    """Of each batch."""
    validation: Sequence[Point]
    num_steps: int
    masks_final: int
    """First step whose masks are those of the end."""
    epochs: float
    """Times that the training data was read."""
    is_same_loss: bool
    """Whether training minimised what validation measures; not with a teacher, or a penalty in the loss."""
    constant: float | None = None
    """Loss of the best constant answer on the training data; None if it is not known."""
    dense_first_epoch: float | None = None
    """Training loss of a dense run at the end of its first epoch, if there is one and it minimised the same loss."""
    metric: Sequence[Point] = ()
    """What chooses the best checkpoint, after the steps of ``validation``, turned so that higher is better."""

    @property
    def end(self) -> float:
        """The training loss at the end: the mean over END of the steps, and of FEWEST_BATCHES batches at least."""
        return end_loss(self.training, self.num_steps)

    @property
    def validation_end(self) -> float | None:
        return self.validation[-1][1] if self.validation else None


@dataclass(frozen=True, slots=True)
class Verdict:
    """``reason``: a clause with the numbers. ``best_step``: the step of the lowest validation loss of a run that
    overfits, if that was seen. ``is_slow``: a run that underfits learned nothing, so its rates are too low."""

    kind: Kind
    reason: str
    best_step: int | None = None
    is_slow: bool = False


@dataclass(frozen=True, slots=True)
class Trend:
    """The slope of a loss, and its standard error."""

    slope: float
    error: float

    @property
    def falls(self) -> bool:
        return self.slope < -ERRORS * self.error

    @property
    def per_doubling(self) -> float:
        """The fall for twice the steps, of a slope in ln(step)."""
        return -self.slope * math.log(2.0)


def judge(losses: Losses) -> Verdict | None:
    """Return what is wrong with a run; None if nothing is, or too little was measured to tell."""
    if len(losses.training) < FEWEST_BATCHES:
        return None
    return _overfitting(losses) or _underfitting(losses)


def end_loss(training: Sequence[Point], num_steps: int) -> float:
    """Return the mean loss of the batches at the end of ``num_steps``; NaN for none."""
    last = [value for step, value in training if (1.0 - END) * num_steps < step <= num_steps]
    return float(
        np.mean(last if len(last) >= FEWEST_BATCHES else [v for _, v in training[-FEWEST_BATCHES:]] or math.nan)
    )


def trend(points: Sequence[Point], since: float, scale: Callable[[float], float] = math.log) -> Trend | None:
    """Fit a + b scale(step) to the points from step ``since`` on; return b with its standard error, or None for fewer
    than FEWEST_EVALUATIONS points, or points of one step."""
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
    error = math.sqrt(float(residuals @ residuals) / (len(x) - 2) / spread)
    return Trend(slope, error)


def noise(points: Sequence[Point]) -> float:
    """Return the standard deviation of a curve of few points about a smooth one, robust to a single turn; 0 for fewer
    than three."""
    distances = []
    for (x0, y0), (x1, y1), (x2, y2) in zip(points, points[1:], points[2:], strict=False):
        right = (x1 - x0) / (x2 - x0)
        distances.append(abs(y1 - right * y2 - (1 - right) * y0) / math.sqrt(1 + right**2 + (1 - right) ** 2))
    return 1.4826 * sorted(distances)[(len(distances) - 1) // 2] if distances else 0.0  # 1 / the quartile of a normal


def _overfitting(losses: Losses) -> Verdict | None:
    points = [point for point in losses.validation if point[0] >= losses.masks_final]
    if len(points) >= FEWEST_EVALUATIONS:
        best_step, lowest = min(points, key=lambda point: point[1])
        last = points[-1][1]
        rises = last - lowest > max(RISE * lowest, ERRORS * noise(points))
        if rises and _fits_closer(losses, best_step, last) and not _metric_gained(losses, best_step):
            return Verdict(
                "overfits",
                f"the validation loss rose from {lowest:.3g} after step {best_step} to {last:.3g}, with a training "
                f"loss of {losses.end:.3g} at the end",
                best_step,
            )
    last_known, constant = losses.validation_end, losses.constant
    if last_known is None or constant is None or not losses.is_same_loss:
        return None
    if last_known > (1.0 + RISE) * constant and losses.end < 0.5 * constant:
        return Verdict(
            "overfits",
            f"the validation loss is {last_known:.3g}, above the {constant:.3g} of always giving the same answer, with "
            f"a training loss of {losses.end:.3g}",
            _lowest_before_the_end(points),
        )
    return None


def _lowest_before_the_end(points: Sequence[Point]) -> int | None:
    lowest = min(points, key=lambda point: point[1], default=None)
    return lowest[0] if lowest and lowest != points[-1] else None


def _fits_closer(losses: Losses, since: int, validation: float) -> bool:
    """Whether the training loss fell after step ``since``, or is far below the validation loss already."""
    found = trend(losses.training, since)
    return (found is not None and found.falls) or (losses.is_same_loss and losses.end < 0.5 * validation)


def _metric_gained(losses: Losses, since: int) -> bool:
    """Whether the metric ended better than it was up to step ``since``: then the loss is not what counts."""
    before = [value for step, value in losses.metric if losses.masks_final <= step <= since]
    return bool(before) and losses.metric[-1][1] > max(before)


def _underfitting(losses: Losses) -> Verdict | None:
    end, constant, dense = losses.end, losses.constant, losses.dense_first_epoch
    if not losses.is_same_loss:
        return _underfitting_by_validation(losses)
    if constant is not None and end > NOT_LEARNED * constant:
        if _lowest_stretch(losses.training) < NOT_LEARNED * constant:
            return None  # it had learned, and lost it to the pruning or to high rates: more of either would not help
        return Verdict(
            "underfits",
            f"the training loss is {end:.3g} at the end, and always giving the same answer has {constant:.3g}",
            is_slow=True,
        )
    since = max(losses.masks_final, losses.num_steps / 2)
    found = trend(losses.training, since)
    if found is None or not _goes_on(losses, since):
        return None
    if dense is not None:
        is_far, steep, far = end > ABOVE_DENSE * dense, STEEP / 2, f"a dense run had {dense:.3g} after its first epoch"
    else:
        is_far, steep, far = constant is None or end > UNLEARNED * constant, STEEP, ""
    if not is_far or found.per_doubling < steep * end or not _also_on_new_text(losses, since):
        return None
    return Verdict("underfits", _still_falling("training", end, found) + (f"; {far}" if far else ""))


def _lowest_stretch(training: Sequence[Point]) -> float:
    """Return the lowest mean of as many batches in a row as count for the end."""
    count = max(FEWEST_BATCHES, round(END * len(training)))
    return float(np.convolve([value for _, value in training], np.full(count, 1.0 / count), mode="valid").min())


def _goes_on(losses: Losses, since: float) -> bool:
    """Whether the training loss falls from ``since`` on, and no less in the second half of the learning: a model
    recovers from its last pruning, and then no longer. Time is what is left of the rates, which fall to zero."""
    steps, training, late = losses.num_steps, losses.training, _half_learned(losses, since)
    if sum(step >= late for step, _ in training) < FEWEST_BATCHES:
        return False
    whole, half = (trend(training, first, lambda step: -((1.0 - step / steps) ** 2)) for first in (since, late))
    if whole is None or half is None or not whole.falls:
        return False
    return half.falls and half.slope < whole.slope / 2


def _half_learned(losses: Losses, since: float) -> float:
    """Return the step before and after which the learning rates, summed from ``since`` on, are the same."""
    return losses.num_steps - (losses.num_steps - since) / math.sqrt(2.0)


def _also_on_new_text(losses: Losses, since: float) -> bool:
    """Whether validation, as far as it says, does not contradict that more training would help."""
    last = losses.validation_end
    found = trend(losses.validation, _half_learned(losses, since)) or trend(losses.validation, since)
    if found is not None and last is not None:
        return found.per_doubling > STEEP / 2 * last
    return last is None or losses.epochs <= 1.0 or last < (1.0 + 2 * RISE) * losses.end


def _underfitting_by_validation(losses: Losses) -> Verdict | None:
    """Judge a run whose training loss is another by its validation loss: a distance from a teacher has no scale."""
    since = max(losses.masks_final, losses.num_steps / 2)
    found, last, constant = trend(losses.validation, since), losses.validation_end, losses.constant
    if found is None or last is None or (constant is not None and last < UNLEARNED * constant):
        return None
    late = trend(losses.validation, _half_learned(losses, since)) or found
    if not found.falls or min(found.per_doubling, late.per_doubling) < STEEP * last:
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
