"""Evaluation during training, and checkpoints: at intervals, of the best model, and of the last step."""

import math
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointState
from pst_ds.checkpoint.mirror import CheckpointMirror, CopyResult, has_copy
from pst_ds.checkpoint.restore import base_fingerprint, magnitude_scales
from pst_ds.checkpoint.retention import step_name
from pst_ds.checkpoint.writer import CheckpointWriter, SaveResult, size_limit
from pst_ds.errors import InputError
from pst_ds.file_names import CHECKPOINTS, step_folders
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel.ds_config import zero_stage
from pst_ds.parallel.ranks import is_main, of_main, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.remote_folder import RemoteFolder
from pst_ds.train.loop import Loop, LoopState
from pst_ds.train.resume import RunProgress, as_table
from pst_ds.train.solved import planned, remove_unused, write_base

_CLOSE_SECONDS = 60.0
_BEAT_SECONDS = 5.0
"""Time between two signs of life while the last copy to a mirror is waited for."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint that the run needs could not be written; raised on every rank."""


class Checkpointer:
    """Decides after each step what to evaluate and save. Creating it and calling any method is collective.

    Args:
        loop: Training loop whose model is evaluated and saved.
        evaluate: Computes the metrics of the model; None for a run without validation data.
        checkpoint: Checkpoint that the run resumes from; None for a new run.
        mirror: Folder to which checkpoints are copied as well; None for none.

    Attributes:
        best_step: Step of the best checkpoint so far; None before the first.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        evaluate: Callable[[], dict[str, float]] | None,
        checkpoint: Checkpoint | None = None,
        mirror: RemoteFolder | None = None,
    ):
        self._loop = loop
        self._run = loop.run
        self._folder = Path(loop.run.output_dir) / CHECKPOINTS
        self._evaluate = evaluate
        self._base = (0, loop.run.model.path, "")
        """The last solve before the newest checkpoint, the folder of its weights, and its fingerprint."""
        self._is_late = False
        """True if a checkpoint was due while the run listened for a solve."""
        self._known: checkpoints.Known = {}
        self._settling = threading.Lock()
        self._best: float | None = None
        self.best_step: int | None = None
        self._last_evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._mirror: CheckpointMirror | None = None
        if mirror is not None:
            self._mirror = CheckpointMirror(self._folder, mirror, self._keep)
        if checkpoint is None:
            self._note_base(0, loop.run.model.path)
        else:
            self._note_base(loop.schedules.last_solve(checkpoint.state.step), checkpoint.state.base_path)
            progress = RunProgress.read(checkpoint)
            step = checkpoint.state.step
            self._best = progress.best_value
            self.best_step = progress.best_step
            self._last_evaluated = (progress.evaluated_step, checkpoint.state.metrics)
            if is_main():
                # a run that was killed between writing a checkpoint and settling it left links and old folders
                self._settle(step, self.best_step, step == loop.num_steps)
        if self._run.schedule.solves:
            # raises now for a base that cannot be written, rather than after the first solve
            of_main(lambda: planned(loop.context, pst_layers(loop.engine.module)))
        self._writer = CheckpointWriter(self._folder, loop.engine)
        self._size_limit = size_limit(loop.engine.module)
        if checkpoint is not None and mirror is not None:
            self._complete_mirror(mirror, checkpoint.folder.name)

    def after_step(self, state: LoopState) -> None:
        """Evaluate and save what is due; call it after each applied step.

        After the last step, or a step at which a signal stops the run, the engine must not change until :meth:`finish`:
        its state is saved without a copy.
        """
        self._report(self._writer.wait(0.0))
        self._report_copies()
        run = self._run
        step = state.step
        is_last = step == self._loop.num_steps
        is_best = False
        if self._evaluate is not None and (is_last or (run.eval.interval > 0 and step % run.eval.interval == 0)):
            values = self._evaluate()
            self._loop.engine.train()
            self._loop.metrics.evaluation(step, values)
            self._last_evaluated = (step, values)
            is_best = self._is_best(step, values[run.metric])
        is_due = self._is_late or (run.checkpoint.interval and step % run.checkpoint.interval == 0)
        # checkpoints do not have the sums of a solve, so one that is due waits until the solve is over
        self._is_late = bool(is_due) and self._loop.source.is_collecting
        if not self._loop.source.is_collecting and (is_due or is_best or is_last or state.stopped_by):
            heartbeat("saving")
            settle = partial(self._settle, step, self.best_step, is_last)
            # one save at a time: the writer has one copy of the state
            self._report(self._writer.wait())
            if not self._has_base(state):
                return
            training_continues = not (is_last or state.stopped_by)
            self._writer.save(
                step_name(step),
                self._state(state),
                copies=training_continues,
                when_written=settle,
                when_known=partial(self._copy_to_mirror, step_name(step)),
            )

    def finish(self, state: LoopState) -> dict[str, float]:
        """Wait for the last save; return the metrics at ``state``. Raises CheckpointWriteError if the save failed."""
        heartbeat("the last checkpoint")
        self._report(self._writer.wait(), is_last=True)
        self._wait_for_mirror()
        step, metrics = self._last_evaluated
        return metrics if step == state.step else {}

    def close(self) -> None:
        """Give a save and a copy in progress time to end, after an error."""
        self._writer.wait(_CLOSE_SECONDS)
        if self._mirror is not None:
            self._mirror.wait(_CLOSE_SECONDS)
            self._report_copies()

    def newest(self) -> str:
        """Name the newest checkpoint, for a message."""
        folders = step_folders(self._folder)
        return str(folders[0]) if folders else "the beginning (nothing was saved yet)"

    def _complete_mirror(self, mirror: RemoteFolder, name: str) -> None:
        """Copy the checkpoint that the run resumes from, if a killed process did not. Collective."""
        if not of_main(lambda: has_copy(mirror, name)):
            self._copy_to_mirror(name)

    def _copy_to_mirror(self, name: str) -> None:
        if self._mirror is not None:
            self._mirror.add(name)

    def _wait_for_mirror(self) -> None:
        """Wait until all copies have ended; the run has nothing else to do."""
        if self._mirror is None:
            return
        if not self._mirror.wait(0.0):
            self._loop.metrics.say(f"waiting until the last checkpoint is copied to {self._mirror.address}")
            while not self._mirror.wait(_BEAT_SECONDS):
                heartbeat(f"the copy of the last checkpoint to {self._mirror.address}")
        self._report_copies()

    def _note_base(self, solve: int, path: str) -> None:
        # on one rank: all have the same files, and reading those of a large base takes seconds
        self._base = (solve, path, of_main(lambda: base_fingerprint(path)))

    def _has_base(self, state: LoopState) -> bool:
        """Write the weights after the last solve, unless that was done. Return False if that failed. Collective."""
        loop = self._loop
        solve = loop.schedules.last_solve(state.step)
        if solve != self._base[0]:
            try:
                self._note_base(solve, str(write_base(loop.context, loop.engine.module, solve)))
            except (InputError, OSError) as error:
                is_last = state.step == loop.num_steps or bool(state.stopped_by)
                self._report(SaveResult(step_name(state.step), 0, 0.0, str(error)), is_last=is_last)
                return False
        return True

    def _is_best(self, step: int, value: float) -> bool:
        """Return whether the model with metric ``value`` is the best so far, and remember it if so.

        Only models in their final form count: final sparsity and ranks, quantised if it ever is. NaN is never better,
        and any number is better than NaN.
        """
        if math.isnan(value) or not self._loop.schedules.is_settled(step):
            return False
        if self._best is not None and not math.isnan(self._best):
            is_better = value > self._best
            if self._loop.context.task.lower_is_better:
                is_better = value < self._best
            if not is_better:
                return False
        self._best = value
        self.best_step = step
        return True

    def _settle(self, step: int, best_step: int | None, is_last: bool) -> None:
        keep_last = self._run.checkpoint.keep_last
        # the thread of a save calls this too, and two would remove each other's folders
        with self._settling:
            self._known[step_name(step)] = best_step
            checkpoints.settle(
                self._folder,
                step,
                best_step=best_step,
                is_last=is_last,
                keep_last=keep_last,
                known=self._known,
                in_use=self._in_use(),
            )
            remove_unused(self._run, self._loop.schedules)

    def _keep(self) -> None:
        """Remove checkpoints that stayed only until they were copied."""
        with self._settling:
            checkpoints.keep(self._folder, self._run.checkpoint.keep_last, self._known, self._in_use())

    def _in_use(self) -> frozenset[str]:
        return frozenset() if self._mirror is None else self._mirror.in_use()

    def _state(self, state: LoopState) -> CheckpointState:
        context = self._loop.context
        engine = self._loop.engine
        schedules = self._loop.schedules
        evaluated_step, metrics = self._last_evaluated
        groups: dict[str, dict[str, object]] = {
            group["name"]: {"lr": group["lr"], "peak_lr": group["peak_lr"], "betas": list(group["betas"])}
            for group in engine.optimizer.param_groups
        }
        progress = RunProgress(
            loop=state,
            skipped_steps=engine.skipped_steps,
            seconds=self._loop.metrics.seconds,
            groups=groups,
            best_step=self.best_step,
            best_value=self._best,
            evaluated_step=evaluated_step,
            data_digest=self._loop.examples.digest,
            run=as_table(self._run),
            world_size=world_size(),
            zero_stage=zero_stage(context.ds_config),
        )
        return CheckpointState(
            step=state.step,
            sparsity=schedules.sparsity_at(state.step),
            masks_frozen=schedules.masks is None or schedules.masks_final_at(state.step),
            magnitude_scales=magnitude_scales(engine.module),
            metrics=metrics if evaluated_step == state.step else {},
            rounds=schedules.quantises_at(state.step),
            progress=progress.as_json(),
            precision=self._run.train.precision,
            device_type=context.device.partition(":")[0],
            base_path=self._base[1],
            base_fingerprint=self._base[2],
            labels=context.labels,
        )

    def _report(self, saved: SaveResult | None, *, is_last: bool = False) -> None:
        """Log how a save ended. A failure is a warning, or for the last save a CheckpointWriteError."""
        if saved is None:
            return
        metrics = self._loop.metrics
        path = self._folder / saved.name
        step = int(saved.name.rpartition("-")[2])
        if not saved.error:
            seconds = round(saved.blocked_seconds, 4)
            metrics.write(step, {"event": "checkpoint", "bytes": saved.bytes, "blocked_seconds": seconds})
            limit = f"{self._size_limit / 1e6:.2f} MB is the most"
            metrics.say(f"saved {path}: {saved.bytes / 1e6:.2f} MB ({limit})")
            return
        metrics.write(step, {"event": "checkpoint_failed", "error": saved.error})
        failure = f"{path} could not be written: {saved.error}. The run goes on"
        if is_last:
            raise CheckpointWriteError(f"{failure} from {self.newest()} with resume = true, once there is room")
        if is_main():
            print(f"WARNING: {failure}; its newest checkpoint is {self.newest()}", file=sys.stderr, flush=True)

    def _report_copies(self) -> None:
        """Log how copies to the mirror ended. A failure is a warning: the run has its own checkpoints."""
        if self._mirror is None:
            return
        for copy in self._mirror.results():
            self._report_copy(copy, self._mirror.address)

    def _report_copy(self, copy: CopyResult, address: str) -> None:
        metrics = self._loop.metrics
        step = int(copy.name.rpartition("-")[2])
        where = f"{address}/{copy.name}"
        if not copy.error:
            metrics.write(step, {"event": "mirrored", "bytes": copy.bytes, "copy_seconds": copy.seconds})
            metrics.say(f"copied to {where}: {copy.bytes / 1e6:.2f} MB in {copy.seconds:.1f} s")
            return
        metrics.write(step, {"event": "mirror_failed", "error": copy.error})
        if is_main():
            print(
                f"WARNING: {where} could not be written: {copy.error}. The run goes on; its checkpoints are in "
                f"{self._folder}",
                file=sys.stderr,
                flush=True,
            )
