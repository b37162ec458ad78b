"""Write a run for TensorBoard: scalars, histograms, and the settings with the final metrics."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import summary as torch_summary

FOLDER = "tensorboard"
_FORMAT = "brain.Event:2"


class TensorBoardWriter:
    """Event files of a run folder. A run that resumes after ``step`` keeps its points up to that step. Records are
    written immediately. SummaryWriter has a thread with a queue of ten, which training would wait for."""

    def __init__(self, folder: Path, step: int):
        if not step:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
        (folder / FOLDER).mkdir(exist_ok=True)
        now = time.time_ns()
        # files are read in the order of their names
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now}"
        self._records = RecordWriter((folder / FOLDER / name).open("xb"))
        self._newest: dict[str, int] = {}
        self._write(Event(file_version=_FORMAT), None)
        # needed even without points to purge: readers take the first such mark for the start of the run
        self._write(Event(session_log=SessionLog(status=SessionLog.START)), step + 1 if step else 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point per tag, unless it has one at ``step``: a mask update and the report of its step share values."""
        new = {tag: value for tag, value in values.items() if self._newest.get(tag) != step}
        if new:
            self._newest.update(dict.fromkeys(new, step))
            self._add(Summary(value=[Summary.Value(tag=tag, simple_value=new[tag]) for tag in new]), step)

    def histogram(self, tag: str, counts: Sequence[int], low: float, high: float, step: int, description: str) -> None:
        """Add a histogram: ``counts`` in equal bins of [low, high], with a ``description`` in Markdown."""
        edges = np.linspace(low, high, len(counts) + 1)
        about = histogram_metadata.create_summary_metadata(display_name="", description=description)
        bins = make_tensor_proto(np.stack([edges[:-1], edges[1:], np.asarray(counts, dtype=float)], 1))
        self._add(Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=bins)]), step)

    def hparams(self, settings: Mapping[str, object], metric_tags: Sequence[str]) -> None:
        """Add the run's settings, with the last values of ``metric_tags`` as results. SummaryWriter.add_hparams would
        create a second run."""
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for summary in torch_summary.hparams(plain, dict.fromkeys(metric_tags, 0.0)):
            self._add(summary, None)

    def text(self, tag: str, text: str, step: int) -> None:
        """Add a text in Markdown."""
        self._add(torch_summary.text(tag, text), step)

    def close(self) -> None:
        self._records.close()

    def _add(self, summary: Summary, step: int | None) -> None:
        self._write(Event(summary=summary), step)

    def _write(self, event: Event, step: int | None) -> None:
        event.wall_time = time.time()
        if step is not None:
            event.step = step
        self._records.write(event.SerializeToString())
        self._records.flush()
