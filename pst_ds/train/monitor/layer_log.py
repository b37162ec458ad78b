"""Record a run's layers from rank 0: layers.jsonl, and scalars of each layer for TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pst_ds.file_names import LAYERS_FILE
from pst_ds.masks.layer_stats import LayerStats
from pst_ds.masks.update import MaskStats
from pst_ds.train.monitor.json_lines import JsonLines, lines_until

if TYPE_CHECKING:
    from pst_ds.train.monitor.tensorboard import TensorBoardWriter


class _MaskCounts(NamedTuple):
    """Counts of the last mask update, per layer."""

    kept: Sequence[int]
    """Weights that the mask keeps."""
    flipped: Sequence[int]
    """Bits that the update changed."""


class LayerLog:
    """Writes layers.jsonl and the layers' part of TensorBoard.

    Args:
        layers: Number of weights of each layer, by name in model order.
        step: Step after which the run resumes; 0 for a new run.
    """

    def __init__(self, folder: Path, board: "TensorBoardWriter", layers: dict[str, int], step: int):
        self._board = board
        self._names = list(layers)
        self._weights = list(layers.values())
        self._latest: _MaskCounts | None = None
        path = folder / LAYERS_FILE
        self._file = JsonLines(path, step, head={"layers": self._names, "weights": self._weights})
        # scalars show the counts of the last mask update, which may have been before the run was interrupted
        for line in lines_until(path, step):
            if line["event"] == "masks":
                self._latest = _MaskCounts(line["kept"], line["flipped"])

    def masks(self, step: int, masks: MaskStats) -> None:
        """Record a mask update."""
        self._latest = _MaskCounts(masks.kept, masks.flipped)
        self._file.write({"step": step, "event": "masks", "kept": masks.kept, "flipped": masks.flipped})

    def rounding(self, step: int, errors: Sequence[float]) -> None:
        """Record the relative error of each layer's quantised weights."""
        self._file.write({"step": step, "event": "rounding", "error": _six_digits(errors)})
        points = {}
        for name, error in zip(self._names, errors, strict=True):
            points[f"layers/{name}/rounding_error"] = error
        self._board.scalars(points, step)

    def figures(self, step: int, stats: LayerStats) -> None:
        """Record statistics of the layers after ``step``."""
        line: dict[str, object] = {"step": step, "event": "scores"}
        for figure in ("correlation", "score_norm", "update_norm", "weight_norm"):
            line[figure] = _six_digits(getattr(stats, figure))
        self._file.write(line)
        self._board.scalars(self._scalars(stats), step)

    def close(self) -> None:
        self._file.close()

    def _scalars(self, stats: LayerStats) -> dict[str, float]:
        """Return the scalars of each layer, by tag."""
        points: dict[str, float] = {}
        for i, name in enumerate(self._names):
            values = {"correlation": stats.correlation[i], "score_norm": stats.score_norm[i]}
            if stats.with_scores and self._latest is not None:
                values["sparsity"] = 1.0 - self._latest.kept[i] / self._weights[i]
                values["flip_rate"] = self._latest.flipped[i] / self._weights[i]
            update_norm = stats.update_norm[i]
            weight_norm = stats.weight_norm[i]
            if update_norm is not None and weight_norm:  # a weight that is all zero has no relative norm
                values["relative_update_norm"] = update_norm / weight_norm
            for figure, value in values.items():
                if value is not None:
                    points[f"layers/{name}/{figure}"] = value
        return points


def _six_digits(values: Sequence[float | None]) -> list[float | None]:
    """Return ``values`` with six digits, about what fp32 has; as Python prints them, lines would be twice as long."""
    rounded: list[float | None] = []
    for value in values:
        rounded.append(None if value is None else float(f"{value:.6g}"))
    return rounded
