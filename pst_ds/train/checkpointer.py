"""Evaluation during training, and checkpoints: at intervals, of the best model, and of the last step."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointState
from pst_ds.checkpoint.restore import weight_scales
from pst_ds.checkpoint.retention import step_name
from pst_ds.checkpoint.writer import CheckpointWriter, SaveResult, size_limit
from pst_ds.config.run import RunConfig
from pst_ds.core.schedule import Schedules
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.ranks import is_main
from pst_ds.parallel.stop_signals import name_of
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.train.loop import LoopState
from pst_ds.train.monitor.metrics import MetricsWriter
from pst_ds.train.run_folder import RunProgress

_CLOSE_SECONDS = 60.0


class CheckpointWriteError(RuntimeError):
    """A checkpoint that the run cannot do without was not written; raised on every rank."""


class Checkpointer:
    """Decides after each step what to evaluate and save. All methods, and making it, are collective.

    Args:
        folder: Where the checkpoints go.
        num_steps: The last step, which is always evaluated and saved.
        evaluate: Computes the metrics of the engine's model; None for a run without validation data.
        lower_is_better: Whether the run's metric is one to minimise.
        watched: Steps that are evaluated too, which choose no best checkpoint.
        new_state, new_progress: Make what a checkpoint records, given what changes during the run.
        checkpoint: The one that the run continues from.
    """

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        schedules: Schedules,
        metrics: MetricsWriter,
        *,
        folder: Path,
        num_steps: int,
        evaluate: Callable[[], dict[str, float]] | None,
        lower_is_better: bool,
        watched: Collection[int] = (),
        new_state: partial[CheckpointState],
        new_progress: Callable[..., RunProgress],
        checkpoint: Checkpoint | None = None,
    ):
        self._run, self._engine, self._schedules, self._metrics = run, engine, schedules, metrics
        self._folder, self._num_steps = folder, num_steps
        self._evaluate_now, self._lower_is_better, self._watched = evaluate, lower_is_better, watched
        self._new_state, self._new_progress = new_state, new_progress
        self._known: checkpoints.Known = {}
        self._settling = threading.Lock()
        self._best: float | None = None
        self.best_step: int | None = None
        self._last_evaluated: tuple[int, dict[str, float]] = (-1, {})
        if checkpoint is not None:
            progress, step = RunProgress.read(checkpoint), checkpoint.state.step
            self._best, self.best_step = progress.best_value, progress.best_step
            self._last_evaluated = (progress.evaluated_step, checkpoint.state.metrics)
            if is_main():
                self._settle(step, self.best_step, step == num_steps)
        self._writer = CheckpointWriter(folder, engine)
        self._size_limit = size_limit(engine.module)

    def after_step(self, state: LoopState) -> None:
        """Evaluate and save what is due; to be called after each applied step. After the last one, or one that a signal
        has stopped, the engine has to stay as it is until :meth:`finish`: it is saved without a copy."""
        self._report(self._writer.wait(0.0))
        is_last = state.step == self._num_steps
        interval = self._run.eval.interval
        chooses = is_last or (interval > 0 and state.step % interval == 0)
        evaluates = self._evaluate_now is not None and (chooses or state.step in self._watched)
        if evaluates:
            self._evaluate(state)
        is_best = evaluates and chooses and self._is_best(state)
        due = self._run.checkpoint.interval and state.step % self._run.checkpoint.interval == 0
        saves = due or is_best or is_last or state.stopped_by
        if saves:
            heartbeat("saving")
            settle = partial(self._settle, state.step, self.best_step, is_last)
            self._report(self._writer.wait())
            goes_on = not (is_last or state.stopped_by)
            self._writer.save(step_name(state.step), self._state(state), copies=goes_on, when_written=settle)

    def finish(self, state: LoopState) -> dict[str, float]:
        """Wait for the last save; return the metrics at ``state``. Raises CheckpointWriteError if it failed."""
        heartbeat("the last checkpoint")
        self._report(self._writer.wait(), is_last=True)
        step, metrics = self._last_evaluated
        return metrics if step == state.step else {}

    def close(self) -> None:
        """After an error, give a save that is being written time to end."""
        self._writer.wait(_CLOSE_SECONDS)

    def how_it_stopped(self, signal: int, step: int) -> str:
        """Say that ``signal`` has stopped the run after ``step``, and from where it can be resumed."""
        after = f"after step {step} of {self._num_steps}"
        return f"stopped by {name_of(signal)} {after}, saved in {self.newest()}; go on with --resume"

    def newest(self) -> str:
        """Name the newest checkpoint, for a message."""
        folders = checkpoints.step_folders(self._folder)
        return str(folders[0]) if folders else "the beginning (nothing was saved yet)"

    def _evaluate(self, state: LoopState) -> None:
        assert self._evaluate_now is not None
        values = self._evaluate_now()
        self._engine.train()
        self._metrics.evaluation(state.step, values)
        self._last_evaluated = (state.step, values)

    def _is_best(self, state: LoopState) -> bool:
        """Return whether the model, just evaluated, is the best so far at the final sparsity and ranks, and quantised
        if it will be; remember it if so."""
        value = self._last_evaluated[1][self._run.metric]
        if not self._schedules.is_settled(state.step) or not self._is_better(value):
            return False
        self._best, self.best_step = value, state.step
        return True

    def _is_better(self, value: float) -> bool:
        """A NaN is never better, and any number is better than a NaN."""
        if math.isnan(value):
            return False
        if self._best is None or math.isnan(self._best):
            return True
        return value < self._best if self._lower_is_better else value > self._best

    def _settle(self, step: int, best_step: int | None, is_last: bool) -> None:
        keep_last = self._run.checkpoint.keep_last
        with self._settling:
            self._known[step_name(step)] = best_step
            checkpoints.settle(
                self._folder, step, best_step=best_step, is_last=is_last, keep_last=keep_last, known=self._known
            )  # fmt: skip

    def _state(self, state: LoopState) -> CheckpointState:
        (evaluated_step, metrics), schedules = self._last_evaluated, self._schedules
        best = {"best_step": self.best_step, "best_value": self._best, "evaluated_step": evaluated_step}
        progress = self._new_progress(state, seconds=self._metrics.seconds, **best)
        return self._new_state(
            step=state.step,
            sparsity=schedules.sparsity_at(state.step),
            masks_frozen=schedules.masks is None or schedules.masks_final_at(state.step),
            weight_scales=weight_scales(self._engine.module),
            metrics=metrics if evaluated_step == state.step else {},
            rounds=schedules.quantises_at(state.step),
            progress=asdict(progress),
        )

    def _report(self, saved: SaveResult | None, *, is_last: bool = False) -> None:
        """Log how a save ended. A failure is a warning, or for the last save a CheckpointWriteError."""
        if saved is None:
            return
        path, step = self._folder / saved.name, int(saved.name.rpartition("-")[2])
        if not saved.error:
            seconds = round(saved.blocked_seconds, 4)
            self._metrics.write(step, {"event": "checkpoint", "bytes": saved.bytes, "blocked_seconds": seconds})
            limit = f"{self._size_limit / 1e6:.2f} MB is the most"
            self._metrics.say(f"saved {path}: {saved.bytes / 1e6:.2f} MB ({limit})")
            return
        self._metrics.write(step, {"event": "checkpoint_failed", "error": saved.error})
        failure = f"{path} could not be written: {saved.error}. The run goes on"
        if is_last:
            raise CheckpointWriteError(f"{failure} from {self.newest()} with --resume, once there is room")
        if is_main():
            print(f"WARNING: {failure}; its newest checkpoint is {self.newest()}", file=sys.stderr, flush=True)
