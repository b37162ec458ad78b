"""Evaluation on the way, and checkpoints: every so many steps, of the best model, and of the last step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointState
from pst_ds.checkpoint.restore import weight_scales
from pst_ds.checkpoint.retention import step_name
from pst_ds.checkpoint.writer import CheckpointWriter, Written, size_limit
from pst_ds.config.run import RunConfig
from pst_ds.parallel.ranks import is_main, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.train.loop import Loop, LoopState
from pst_ds.train.resume import Progress, progress_of

_CLOSE_SECONDS = 60.0


class CheckpointWriteError(RuntimeError):
    """A checkpoint that the run cannot do without was not written; raised on every rank."""


class Checkpointer:
    """Decides after each step what to evaluate and save. Collective in all it does.

    ``describe`` gives the parts of a checkpoint's state that do not change in a run.
    """

    def __init__(
        self,
        run: RunConfig,
        *,
        folder: Path,
        evaluate: Callable[[], dict[str, float]] | None,
        lower_is_better: bool,
        describe: dict[str, Any],
        data_digest: str,
        zero_stage: int,
    ):
        self._run, self._folder = run, folder
        self._evaluate_now, self._lower_is_better = evaluate, lower_is_better
        self._describe, self._data_digest, self._zero_stage = describe, data_digest, zero_stage
        self._best: float | None = None
        self.best_step: int | None = None
        self._last_evaluated: tuple[int, dict[str, float]] = (-1, {})
        self.loop: Loop

    def start(self, loop: Loop, checkpoint: Checkpoint | None) -> None:
        """Before ``loop`` begins, or goes on from ``checkpoint``. Collective."""
        self.loop = loop
        if checkpoint is not None:
            progress, step = Progress.read(checkpoint), checkpoint.state.step
            self._best, self.best_step = progress.best_value, progress.best_step
            self._last_evaluated = (progress.evaluated_step, checkpoint.state.metrics)
            if is_main():
                self._settle(step, self.best_step, step == loop.num_steps)
        self._writer = CheckpointWriter(self._folder, loop.engine)
        self._size_limit = size_limit(loop.engine.module)

    def after_step(self, state: LoopState) -> None:
        """To be called by the loop after each applied step."""
        self._report(self._writer.wait(0.0))
        is_last = state.step == self.loop.num_steps
        interval = self._run.eval.interval
        is_best = False
        if self._evaluate_now is not None and (is_last or (interval and state.step % interval == 0)):
            is_best = self._evaluate(state)
        due = self._run.checkpoint.interval and state.step % self._run.checkpoint.interval == 0
        if due or is_best or is_last or state.stopped_by:
            self._save(state, is_last)

    def finish(self, state: LoopState) -> dict[str, float]:
        """Wait for the last save; returns the last metrics. Raises CheckpointWriteError when it failed."""
        heartbeat("the last checkpoint")
        written = self._writer.wait()
        if written is None or not written.error:
            self._report(written)
        else:
            self._write_failure(written)
            raise CheckpointWriteError(
                f"{self._folder / written.name} could not be written: {written.error}. The run goes on from "
                f"{self.newest()} with --resume, once there is room"
            )
        step, metrics = self._last_evaluated
        return metrics if step == state.step else {}

    def close(self) -> None:
        """Give a save that is being written the time to end, after an error."""
        self._writer.wait(_CLOSE_SECONDS)

    def newest(self) -> str:
        """The newest checkpoint, in words."""
        found = checkpoints.step_folders(self._folder)
        return str(found[0]) if found else "the beginning (nothing was saved yet)"

    def _evaluate(self, state: LoopState) -> bool:
        """Whether the model is the best so far at the final sparsity."""
        assert self._evaluate_now is not None
        values = self._evaluate_now()
        self.loop.engine.train()
        metrics, schedule = self.loop.metrics, self.loop.schedule
        metrics.write(state.step, {"event": "evaluation", **{f"eval/{k}": v for k, v in values.items()}})
        metrics.say(f"step {state.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        self._last_evaluated = (state.step, values)
        value = values[self._run.metric]
        if (schedule is not None and not schedule.is_final(state.step)) or not self._is_better(value):
            return False
        self._best, self.best_step = value, state.step
        return True

    def _is_better(self, value: float) -> bool:
        """No NaN is better than anything, and any number is better than a NaN."""
        if math.isnan(value):
            return False
        if self._best is None or math.isnan(self._best):
            return True
        return value < self._best if self._lower_is_better else value > self._best

    def _save(self, state: LoopState, is_last: bool) -> None:
        heartbeat("saving")
        settle = partial(self._settle, state.step, self.best_step, is_last)
        self._report(self._writer.wait())
        self._writer.save(step_name(state.step), self._state(state), when_written=settle)

    def _settle(self, step: int, best_step: int | None, is_last: bool) -> None:
        keep_last = self._run.checkpoint.keep_last
        checkpoints.settle(self._folder, step, best_step=best_step, is_last=is_last, keep_last=keep_last)

    def _state(self, state: LoopState) -> CheckpointState:
        step, metrics = self._last_evaluated
        schedule = self.loop.schedule
        progress = progress_of(
            self.loop,
            state,
            best_step=self.best_step,
            best_value=self._best,
            evaluated_step=step,
            data_digest=self._data_digest,
            world_size=world_size(),
            zero_stage=self._zero_stage,
        )
        return CheckpointState(
            step=state.step,
            sparsity=schedule.sparsity_at(state.step) if schedule else 0.0,
            masks_frozen=schedule is None or schedule.is_final(state.step),
            weight_scales=weight_scales(self.loop.engine.module),
            metrics=metrics if step == state.step else {},
            progress=asdict(progress),
            **self._describe,
        )

    def _report(self, written: Written | None) -> None:
        if written is None:
            return
        if written.error:
            self._write_failure(written)
            if is_main():
                print(
                    f"WARNING: {self._folder / written.name} could not be written: {written.error}. The run goes on; "
                    f"its newest checkpoint is {self.newest()}",
                    file=sys.stderr,
                    flush=True,
                )
            return
        about = {"bytes": written.bytes, "blocked_seconds": round(written.blocked_seconds, 4)}
        self.loop.metrics.write(_step_of(written), {"event": "checkpoint", **about})
        limit = f"{self._size_limit / 1e6:.2f} MB is the most"
        self.loop.metrics.say(f"saved {self._folder / written.name}: {written.bytes / 1e6:.2f} MB ({limit})")

    def _write_failure(self, written: Written) -> None:
        self.loop.metrics.write(_step_of(written), {"event": "checkpoint_failed", "error": written.error})


def _step_of(written: Written) -> int:
    return int(written.name.rpartition("-")[2])
