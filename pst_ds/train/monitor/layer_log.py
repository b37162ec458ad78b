"""Record a run's layers from rank 0: layers.jsonl, and scalars of each layer for TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pst_ds.file_names import LAYERS_FILE
from pst_ds.masks.layer_stats import LayerStats
from pst_ds.masks.update import MaskStats
from pst_ds.train.monitor.json_lines import JsonLines, lines_until

if TYPE_CHECKING:
    from pst_ds.train.monitor.tensorboard import TensorBoardWriter


class LayerLog:
    """Writes layers.jsonl and the layers' part of TensorBoard.

    Args:
        layers: Number of weights of each layer, by name in model order.
        step: Step after which the run resumes; 0 for a new run.
    """

    def __init__(self, folder: Path, board: "TensorBoardWriter", layers: dict[str, int], step: int):
        self._board = board
        self._names, self._weights = list(layers), list(layers.values())
        self._latest: tuple[Sequence[int], Sequence[int]] | None = None
        path = folder / LAYERS_FILE
        self._file = JsonLines(path, step, head={"layers": self._names, "weights": self._weights})
        for line in lines_until(path, step):
            if line["event"] == "masks":
                self._latest = line["kept"], line["flipped"]

    def masks(self, step: int, masks: MaskStats) -> None:
        """Record a mask update."""
        self._latest = masks.kept, masks.flipped
        self._file.write({"step": step, "event": "masks", "kept": masks.kept, "flipped": masks.flipped})

    def rounding(self, step: int, errors: Sequence[float]) -> None:
        """Record the relative error of each layer's quantised weights."""
        self._file.write({"step": step, "event": "rounding", "error": [_six_digits(error) for error in errors]})
        by_layer = zip(self._names, errors, strict=True)
        self._board.scalars({f"layers/{name}/rounding_error": error for name, error in by_layer}, step)

    def figures(self, step: int, found: LayerStats) -> None:
        """Record statistics of the layers after ``step``."""
        names = ("correlation", "score_norm", "update_norm", "weight_norm")
        values = {name: [_six_digits(value) for value in getattr(found, name)] for name in names}
        self._file.write({"step": step, "event": "scores", **values})
        self._board.scalars(self._scalars(found), step)

    def close(self) -> None:
        self._file.close()

    def _scalars(self, found: LayerStats) -> dict[str, float]:
        """Return the scalars of each layer, by tag."""
        points: dict[str, float] = {}
        for i, name in enumerate(self._names):
            values = {"correlation": found.correlation[i], "score_norm": found.score_norm[i]}
            if found.with_scores and self._latest is not None:
                kept, flipped = self._latest
                values["sparsity"] = 1.0 - kept[i] / self._weights[i]
                values["flip_rate"] = flipped[i] / self._weights[i]
            update, weight = found.update_norm[i], found.weight_norm[i]
            values["relative_update_norm"] = update / weight if update is not None and weight else None
            points |= {f"layers/{name}/{figure}": value for figure, value in values.items() if value is not None}
        return points


def _six_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
