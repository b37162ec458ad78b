"""How well a run fits its data: the steps at which that is measured, the verdict at the end, and what to change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pst_ds.config.run import RunConfig
from pst_ds.core.schedule import Schedule
from pst_ds.data.tasks import ExampleSet, Task
from pst_ds.file_names import METRICS_FILE
from pst_ds.parallel.ranks import all_gather_objects, is_main
from pst_ds.train.monitor.curves import EVALUATION, Point, batch_losses, read_curves
from pst_ds.train.monitor.dense_run import DenseRun
from pst_ds.train.monitor.metrics import MetricsWriter
from pst_ds.train.monitor.verdict import END, Losses, Verdict, end_loss, judge, sentence

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


def judged_fit(
    run: RunConfig, task: Task, examples: ExampleSet, num_steps: int, dense: DenseRun | None, metrics: MetricsWriter
) -> Fit:
    """Judge a run that has ended, and say if something is wrong; the same on every rank. Collective."""
    fit = all_gather_objects(fit_of(run, task, examples, num_steps, dense) if is_main() else None)[0]
    assert fit is not None, "rank 0 has judged"
    if fit.verdict:
        metrics.verdict(num_steps, sentence(fit.as_table()))
    return fit


def fit_of(run: RunConfig, task: Task, examples: ExampleSet, num_steps: int, dense: DenseRun | None) -> Fit:
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
