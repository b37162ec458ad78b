"""Write a run for TensorBoard: scalars, images, histograms, and the settings with the final metrics."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pst_ds.train.monitor.images import png_of

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

FOLDER = "tensorboard"
_FORMAT = "brain.Event:2"


class TensorBoardWriter:
    """The event files of a run folder. Of a run that is continued after ``step`` the points up to there stay.

    Records are written as they come. SummaryWriter has a thread with a queue of ten, for which training would wait
    whenever there is more to write.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        if not step:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
        (folder / FOLDER).mkdir(exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now}"  # read in this order
        self._records = RecordWriter((folder / FOLDER / name).open("xb"))
        self._newest: dict[str, int] = {}
        self._write(Event(file_version=_FORMAT), None)
        # also where nothing is to be purged: readers take the first such mark for the beginning of the run
        self._write(Event(session_log=SessionLog(status=SessionLog.START)), step + 1 if step else 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A point for every tag, unless it has one at ``step``: mask updates and reports of one step say the same."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        new = {tag: value for tag, value in values.items() if self._newest.get(tag) != step}
        if new:
            self._newest.update(dict.fromkeys(new, step))
            self._add(Summary(value=[Summary.Value(tag=tag, simple_value=new[tag]) for tag in new]), step)

    def picture(self, tag: str, pixels: np.ndarray, step: int, description: str) -> None:
        """``pixels`` as images.py draws them. ``description``: Markdown, shown with the tag."""
        from tensorboard.plugins.image import metadata

        height, width = pixels.shape
        about = metadata.create_summary_metadata(display_name="", description=description)
        self._tensor(tag, [str(width).encode(), str(height).encode(), png_of(pixels)], step, about)

    def histogram(self, tag: str, counts: Sequence[int], low: float, high: float, step: int, description: str) -> None:
        """``counts`` of values in equal bins of [low, high]."""
        from tensorboard.plugins.histogram import metadata

        edges = np.linspace(low, high, len(counts) + 1)
        about = metadata.create_summary_metadata(display_name="", description=description)
        self._tensor(tag, np.stack([edges[:-1], edges[1:], np.asarray(counts, dtype=float)], 1), step, about)

    def hparams(self, settings: Mapping[str, object], metric_tags: Sequence[str]) -> None:
        """The run's settings, with the last values of ``metric_tags`` as what came of them. In this run's own files:
        SummaryWriter.add_hparams would make a second run."""
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in settings.items()}
        for summary in hparams(plain, dict.fromkeys(metric_tags, 0.0)):
            self._add(summary, None)

    def text(self, tag: str, text: str, step: int) -> None:
        """``text``: Markdown."""
        from torch.utils.tensorboard import summary

        self._add(summary.text(tag, text), step)

    def close(self) -> None:
        self._records.close()

    def _tensor(self, tag: str, data: list[bytes] | np.ndarray, step: int, about: object) -> None:
        """One point of the kind that ``about`` names. SummaryWriter's own pictures and histograms have no description:
        TensorBoard's data server drops it."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.util.tensor_util import make_tensor_proto

        self._add(Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=make_tensor_proto(data))]), step)

    def _add(self, summary: Summary, step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._write(Event(summary=summary), step)

    def _write(self, event: Event, step: int | None) -> None:
        event.wall_time = time.time()
        if step is not None:
            event.step = step
        self._records.write(event.SerializeToString())
        self._records.flush()
