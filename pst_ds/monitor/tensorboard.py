"""Write a run for TensorBoard: scalars, images, histograms, and the settings with the final metrics."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

FOLDER = "tensorboard"


class TensorBoardWriter:
    """The event files of a run folder. Of a run that is continued after ``step`` the points up to there stay."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        if not step:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
        # also where nothing is to be purged: readers take the first such mark for the beginning of the run
        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=step + 1 if step else 0)
        self._newest: dict[str, int] = {}

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point, unless the tag has one at ``step``: a mask update and a report of the same step say the same."""
        if self._newest.get(tag) != step:
            self._newest[tag] = step
            self._writer.add_scalar(tag, value, step)

    def picture(self, tag: str, pixels: np.ndarray, step: int, description: str) -> None:
        """``pixels``: (height, width, 4) uint8. ``description``: Markdown, shown with the tag."""
        from PIL import Image
        from tensorboard.plugins.image import metadata

        png = io.BytesIO()
        Image.fromarray(pixels).save(png, format="PNG")
        height, width, _ = pixels.shape
        about = metadata.create_summary_metadata(display_name="", description=description)
        self._tensor(tag, [str(width).encode(), str(height).encode(), png.getvalue()], step, about)

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
        self._writer.add_text(tag, text, step)

    def close(self) -> None:
        self._writer.close()

    def _tensor(self, tag: str, data: list[bytes] | np.ndarray, step: int, about: object) -> None:
        """One point of the kind that ``about`` names. SummaryWriter's own pictures and histograms have no description:
        TensorBoard's data server drops it."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.util.tensor_util import make_tensor_proto

        value = Summary.Value(tag=tag, metadata=about, tensor=make_tensor_proto(data))
        self._add(Summary(value=[value]), step)

    def _add(self, summary: object, step: int | None) -> None:
        assert self._writer.file_writer is not None, "the board is closed"
        self._writer.file_writer.add_summary(summary, step)
