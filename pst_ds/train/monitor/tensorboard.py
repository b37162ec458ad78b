"""Write scalars of a run for TensorBoard."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter

FOLDER = "tensorboard"
_QUEUE = 10_000
"""Events that wait for the writer's thread; training would wait for it if they were more."""


class TensorBoardWriter:
    """Event files of a run folder. A run that resumes after ``step`` keeps its points up to that step."""

    def __init__(self, folder: Path, step: int):
        if not step:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
        self._writer = FileWriter(str(folder / FOLDER), max_queue=_QUEUE)
        first_step = 0
        if step:
            first_step = step + 1
        # readers drop the points from this step on, which an earlier process wrote after the checkpoint. The mark is
        # needed even without such points: readers take the first one for the start of the run
        self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), first_step)
        self._newest: dict[str, int] = {}
        """Step of the latest point of each tag."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point per tag, unless it has one at ``step``: a mask update and the report of its step share values."""
        points: list[Summary.Value] = []
        for tag, value in values.items():
            if self._newest.get(tag) != step:
                self._newest[tag] = step
                points.append(Summary.Value(tag=tag, simple_value=value))
        self._writer.add_summary(Summary(value=points), step)
        # so that a killed rank loses no points
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
