"""Record a run's layers from rank 0: layers.jsonl, and scalars of each layer and images for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pst_ds.core.experts.tokens import of_equal_numbers, shares_of_zeros
from pst_ds.file_names import LAYERS_FILE
from pst_ds.masks.layer_stats import LayerStats, ScoreHistogram
from pst_ds.masks.update import MaskStats
from pst_ds.train.monitor import images as pictures
from pst_ds.train.monitor.curves import JsonLines, lines_until

if TYPE_CHECKING:
    from pst_ds.train.monitor.tensorboard import TensorBoardWriter

_ROWS = "Rows: layers, the first on top. Columns: mask updates, the oldest left; a few each in long runs."
SPARSITY_MAP = f"Sparsity: dark violet 0, yellow 1, as on the scale to its right. {_ROWS}"
FLIPS_MAP = (
    "Share of a layer's weights whose mask bit flips at an update, on a logarithmic scale: dark violet one in 100,000 "
    f"or fewer, yellow one in ten or more. {_ROWS}"
)
_EXPERTS = "Columns: experts. Rows: {}, the first on top."
EXPERT_TOKENS = (
    "Tokens that each expert was trained on since the process began: dark violet none, green as many as the experts of "
    f"its module on average, yellow twice as many or more. {_EXPERTS.format('modules')}"
)
EXPERT_ZEROS = f"Sparsity of each expert: dark violet 0, yellow 1. {_EXPERTS.format('stacks')}"
SCORES = (
    "Importance scores S of single weights, from four standard deviations below their mean to four above it; the bars "
    "at both ends have all that is beyond."
)
SPLIT_SCORES = (
    f"{SCORES} Orange: pruned by the mask; blue: kept. The line: where a mask update would cut now. Orange on its "
    "right and blue on its left have crossed it since the last update."
)


class LayerLog:
    """Writes layers.jsonl and TensorBoard images.

    Args:
        layers: Number of weights of each layer, by name in model order.
        step: Step after which the run resumes; 0 for a new run.
    """

    def __init__(self, folder: Path, board: TensorBoardWriter, layers: dict[str, int], step: int):
        self._board = board
        self._names, self._weights = list(layers), list(layers.values())
        self._history = pictures.MaskHistory(self._weights)
        self._latest: tuple[Sequence[int], Sequence[int]] | None = None
        path = folder / LAYERS_FILE
        self._file = JsonLines(path, step, head={"layers": self._names, "weights": self._weights})
        for line in lines_until(path, step):
            if line["event"] == "masks":
                self._remember(line["kept"], line["flipped"])

    def masks(self, step: int, masks: MaskStats) -> None:
        """Record a mask update."""
        self._remember(masks.kept, masks.flipped)
        self._file.write({"step": step, "event": "masks", "kept": masks.kept, "flipped": masks.flipped})

    def rounding(self, step: int, errors: Sequence[float]) -> None:
        """Record the relative error of each layer's quantised weights."""
        self._file.write({"step": step, "event": "rounding", "error": [_six_digits(error) for error in errors]})
        by_layer = zip(self._names, errors, strict=True)
        self._board.scalars({f"layers/{name}/rounding_error": error for name, error in by_layer}, step)

    def experts(self, step: int, counts: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Picture the "expert_tokens" by module and "expert_zeros" by stack, as far as a finished run has them."""
        weights = dict(zip(self._names, self._weights, strict=True))
        for i, table in enumerate(of_equal_numbers(counts.get("expert_tokens", {}))):
            drawn = pictures.heat_map(np.concatenate([pictures.share_on_scale([row]) for row in table.values()]))
            self._board.picture(f"experts/tokens{i or ''}", drawn, step, EXPERT_TOKENS)
        for i, table in enumerate(of_equal_numbers(counts.get("expert_zeros", {}))):
            share = np.array([shares_of_zeros(row, weights[name]) for name, row in table.items()])
            self._board.picture(f"experts/zeros{i or ''}", pictures.heat_map(share), step, EXPERT_ZEROS)

    def figures(self, step: int, found: LayerStats) -> None:
        """Record statistics and images of the layers after ``step``."""
        names = ("correlation", "score_norm", "update_norm", "weight_norm")
        values = {name: [_six_digits(value) for value in getattr(found, name)] for name in names}
        self._file.write({"step": step, "event": "scores", **values})
        self._board.scalars(self._scalars(found), step)
        if found.with_scores and self._latest is not None:
            sparsity, flips = self._history.sparsity(), pictures.flips_on_scale(self._history.flips())
            self._board.picture("heatmap/sparsity", pictures.heat_map(sparsity), step, SPARSITY_MAP)
            self._board.picture("heatmap/flips", pictures.heat_map(flips), step, FLIPS_MAP)
        for histogram in found.histograms:
            self._histogram(step, histogram)

    def close(self) -> None:
        self._file.close()

    def _remember(self, kept: Sequence[int], flipped: Sequence[int]) -> None:
        self._latest = kept, flipped
        self._history.add(kept, flipped)

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

    def _histogram(self, step: int, found: ScoreHistogram) -> None:
        name, width = self._names[found.layer], (found.high - found.low) / len(found.kept)
        line = {**asdict(found), "threshold": _six_digits(found.threshold)}
        self._file.write({"step": step, "event": "histogram", **line})
        at = None if found.threshold is None else (found.threshold - found.low) / width
        drawn = pictures.histogram(found.kept, found.pruned, at)
        self._board.picture(f"histogram/{name}", drawn, step, SPLIT_SCORES)
        counts = [kept + pruned for kept, pruned in zip(found.kept, found.pruned, strict=True)]
        self._board.histogram(f"scores/{name}", counts, found.low, found.high, step, SCORES)


def _six_digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
