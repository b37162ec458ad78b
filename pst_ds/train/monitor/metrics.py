"""Report a run: metrics.jsonl, layers.jsonl, TensorBoard and a progress line, all from rank 0."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pst_ds.file_names import METRICS_FILE
from pst_ds.masks.layer_stats import LayerStats
from pst_ds.masks.update import MaskStats
from pst_ds.masks.update_rank_budget import RankStats
from pst_ds.progress import Progress
from pst_ds.train.monitor.curves import EVALUATION, STRAGGLER
from pst_ds.train.monitor.dense_run import DenseRun
from pst_ds.train.monitor.jsonl import JsonLines
from pst_ds.train.monitor.layer_log import LayerLog
from pst_ds.train.monitor.tensorboard import TensorBoardWriter
from pst_ds.train.monitor.trackers import Trackers

_GROUPS = ("checkpoint", STRAGGLER)


class MetricsWriter:
    """Writes the metrics of a run on rank 0 and does nothing on other ranks.

    Args:
        step: Step after which the run resumes; lines up to it are kept. 0 for a new run.
        seconds: Seconds of training up to ``step``.
        layers: Number of weights of each PST layer, by name in model order.
        dense: Dense run whose losses are written and shown next to this run's.
        trackers: Trackers that get all numbers, too; given on rank 0 only.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_steps: int,
        is_main: bool,
        quiet: bool = False,
        step: int = 0,
        seconds: float = 0.0,
        layers: dict[str, int] | None = None,
        dense: DenseRun | None = None,
        trackers: Trackers | None = None,
    ):
        self._file: JsonLines | None = None
        self._layers: LayerLog | None = None
        self._shown = Progress("step", num_steps, done=step, line_seconds=0.0) if is_main and not quiet else None
        self._dense, self._trackers = dense, trackers
        self._started = time.monotonic() - seconds
        if is_main:
            self._file = JsonLines(folder / METRICS_FILE, step)
            self._board = TensorBoardWriter(folder, step)
            if layers:
                self._layers = LayerLog(folder, self._board, layers, step)

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, over all its processes."""
        return time.monotonic() - self._started

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """One line of metrics.jsonl, and a scalar for every number; some events are a group of their own."""
        if self._file is None:
            return
        values = {**values, **(self._dense.at(step, values) if self._dense else {})}
        self._file.write({"step": step, "seconds": round(self.seconds, 3), **values})
        event = values.get("event")
        group = f"{event}/" if event in _GROUPS else ""
        numbers = {group + name: value for name, value in values.items() if isinstance(value, int | float)}
        self._board.scalars(numbers, step)
        if self._trackers is not None:
            self._trackers.log(step, numbers)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of an evaluation, and show them."""
        values = {f"{EVALUATION}{name}": value for name, value in metrics.items()}
        self.write(step, {"event": "evaluation", **values})
        dense = self._dense.at(step, values) if self._dense else {}
        parts = [f"{k} {v:.4g}" for k, v in metrics.items()] + [f"dense loss {v:.4g}" for v in dense.values()]
        self.say(f"step {step}: " + ", ".join(parts))

    def masks(self, step: int, masks: MaskStats) -> None:
        """Record what a mask update did to each layer."""
        if self._layers is not None:
            self._layers.masks(step, masks)

    def ranks(self, step: int, ranks: RankStats) -> None:
        """Record the components that each layer's update keeps."""
        if self._layers is not None:
            self._layers.ranks(step, ranks)

    def rounding(self, step: int, errors: Sequence[float]) -> None:
        """Record what a search for scales leaves as the relative error of each layer."""
        if self._layers is not None:
            self._layers.rounding(step, errors)

    def figures(self, step: int, found: LayerStats) -> None:
        """Record statistics and images of the layers after ``step``."""
        if self._layers is not None:
            self._layers.figures(step, found)

    def experts(self, step: int, counts: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Picture the "expert_tokens" by module and "expert_zeros" by stack of a run that has ended, if it has any."""
        if self._layers is not None:
            self._layers.experts(step, counts.get("expert_tokens", {}), counts.get("expert_zeros", {}))

    def settings(self, settings: Mapping[str, object], metric_tags: Sequence[str]) -> None:
        """The settings of a run that has ended; its last values of ``metric_tags`` are what came of them."""
        if self._file is not None:
            self._board.hparams(settings, metric_tags)

    def verdict(self, step: int, sentence: str) -> None:
        """Say how a run went that has ended."""
        self.say(sentence)
        if self._file is not None:
            self._board.text("fit", sentence, step)

    def progress(self, step: int, values: Mapping[str, object], batches: int = 1) -> None:
        """Show people where the run is and when it will end; ``values`` begin with the loss of so many batches."""
        if self._shown is not None:
            if self._dense and (dense := self._dense.training_loss(step, batches)) is not None:
                values = {"loss": values["loss"], "dense": dense, **values}
            parts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            self._shown.at(step, " | ".join(parts))

    def say(self, text: str) -> None:
        """One line for people; nothing for an empty one."""
        if self._shown is not None and text:
            self._shown.say(text)

    def close(self) -> None:
        if self._shown is not None:
            self._shown.close()
        if self._file is not None:
            self._file.close()
            self._board.close()
        if self._trackers is not None:
            self._trackers.close()
        if self._layers is not None:
            self._layers.close()


def peak_memory_bytes(device: str) -> int:
    """Return the peak memory of this rank: the accelerator's, or the resident memory of the process on CPU."""
    if device != "cpu":
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
