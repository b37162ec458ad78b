"""Write a run for TensorBoard: scalars, histograms, and the settings with the final metrics."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard import summary as torch_summary

FOLDER = "tensorboard"
_QUEUE = 10_000
"""Events that wait for the writer's thread; training would wait for it if they were more."""


class TensorBoardWriter:
    """Event files of a run folder. A run that resumes after ``step`` keeps its points up to that step."""

    def __init__(self, folder: Path, step: int):
        if not step:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
        # needed even without points to purge: readers take the first such mark for the start of the run
        self._writer = FileWriter(str(folder / FOLDER), max_queue=_QUEUE)
        self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step + 1 if step else 0)
        self._newest: dict[str, int] = {}

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point per tag, unless it has one at ``step``: a mask update and the report of its step share values."""
        new = {tag: value for tag, value in values.items() if self._newest.get(tag) != step}
        self._newest.update(dict.fromkeys(new, step))
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in new.items()]
        self._writer.add_summary(Summary(value=points), step)
        self._writer.flush()

    def histogram(self, tag: str, counts: Sequence[int], low: float, high: float, step: int, description: str) -> None:
        """Add a histogram: ``counts`` in equal bins of [low, high], with a ``description`` in Markdown."""
        edges = np.linspace(low, high, len(counts) + 1)
        about = histogram_metadata.create_summary_metadata(display_name="", description=description)
        bins = make_tensor_proto(np.stack([edges[:-1], edges[1:], np.asarray(counts, dtype=float)], 1))
        self._writer.add_summary(Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=bins)]), step)

    def hparams(self, settings: Mapping[str, object], metric_tags: Sequence[str]) -> None:
        """Add the run's settings, with the last values of ``metric_tags`` as results. SummaryWriter.add_hparams would
        create a second run."""
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for summary in torch_summary.hparams(plain, dict.fromkeys(metric_tags, 0.0)):
            self._writer.add_summary(summary)

    def text(self, tag: str, text: str, step: int) -> None:
        """Add a text in Markdown."""
        self._writer.add_summary(torch_summary.text(tag, text), step)

    def close(self) -> None:
        self._writer.close()
