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

    def close(self) -> None:
        self._writer.close()
