"""Report a run: metrics.jsonl, layers.jsonl, TensorBoard and a progress line, all from rank 0."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pst_ds.file_names import METRICS_FILE
from pst_ds.progress import Progress
from pst_ds.train.monitor.json_lines import EVALUATION, STRAGGLER, JsonLines
from pst_ds.train.monitor.layer_log import LayerLog
from pst_ds.train.monitor.trackers import Trackers

if TYPE_CHECKING:
    from pst_ds.train.monitor.tensorboard import TensorBoardWriter

_GROUPS = ("checkpoint", STRAGGLER)


class MetricsWriter:
    """Writes the metrics of a run on rank 0 and does nothing on other ranks.

    Args:
        step: Step after which the run resumes; lines up to it are kept. 0 for a new run.
        seconds: Seconds of training up to ``step``.
        layers: Number of weights of each PST layer, by name in model order.
        trackers: Trackers that also get all numbers; given on rank 0 only.

    Attributes:
        layers: Log of the PST layers on rank 0; None without such layers and on other ranks.
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
        trackers: Trackers | None = None,
    ):
        self.layers: LayerLog | None = None
        self._file: JsonLines | None = None
        self._board: TensorBoardWriter | None = None
        self._shown: Progress | None = None
        if is_main and not quiet:
            self._shown = Progress("step", num_steps, done=step, line_seconds=0.0)
        self._trackers = trackers
        self._started = time.monotonic() - seconds
        if is_main:
            from pst_ds.train.monitor.tensorboard import TensorBoardWriter

            self._file = JsonLines(folder / METRICS_FILE, step)
            self._board = TensorBoardWriter(folder, step)
            if layers:
                self.layers = LayerLog(folder, self._board, layers, step)

    @property
    def seconds(self) -> float:
        """Training time of the run in seconds, over all its processes."""
        return time.monotonic() - self._started

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Write a line of metrics.jsonl, and its numbers as scalars; some events have their own group of scalars."""
        if self._file is None or self._board is None:
            return
        self._file.write({"step": step, "seconds": round(self.seconds, 3), **values})
        event = values.get("event")
        group = f"{event}/" if event in _GROUPS else ""
        numbers = {}
        for name, value in values.items():
            if isinstance(value, int | float):  # not the names of events, nor lists
                numbers[group + name] = value
        self._board.scalars(numbers, step)
        if self._trackers is not None:
            self._trackers.log(step, numbers)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write and show the metrics of an evaluation."""
        line: dict[str, object] = {"event": "evaluation"}
        shown = []
        for name, value in metrics.items():
            # a prefix, since a task's metric may have the name of a figure of training, such as "loss"
            line[f"{EVALUATION}{name}"] = value
            shown.append(f"{name} {value:.4g}")
        self.write(step, line)
        self.say(f"step {step}: {', '.join(shown)}")

    def progress(self, step: int, values: Mapping[str, object]) -> None:
        """Show the progress of the run with ``values``, first the mean loss."""
        if self._shown is not None:
            parts = []
            for name, value in values.items():
                number = f"{value:.4g}" if isinstance(value, float) else str(value)
                parts.append(f"{name} {number}")
            self._shown.at(step, " | ".join(parts))

    def say(self, text: str) -> None:
        """Show a line, unless it is empty."""
        if self._shown is not None and text:
            self._shown.say(text)

    def close(self) -> None:
        for part in (self._shown, self._file, self._board, self._trackers, self.layers):
            if part is not None:
                part.close()


def peak_memory_bytes(device: str) -> int:
    """Return the peak memory of this rank: the accelerator's, or the resident memory of the process on CPU."""
    if device != "cpu":
        return int(torch.accelerator.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
