"""Predict a number for a text or a pair of texts, by squared error, with a new head."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pst_ds.config.data import EvalConfig
from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.dataset import place_in_split
from pst_ds.data.labelled import Examples, read_labelled, refuse_hidden, tokenized_texts
from pst_ds.data.tasks.classification import Classification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def _numbers(values: Iterable[Any], column: str, where: str, place: Callable[[int], str]) -> list[float]:
    """Return the values of a column as numbers. Raises ConfigError for one that is not a finite number."""
    numbers: list[float] = []
    for row, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            # refused like the infinite ones below
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(
                f"{where}: column {column!r} has {value!r} in {place(row)}. Give every example a finite number"
            )
        numbers.append(number)
    return numbers


def regression_metrics(predicted: np.ndarray, labels: Iterable[float]) -> dict[str, float]:
    """Return scipy's Pearson and Spearman correlation, the mean squared error, its root, and the mean absolute error.

    An undefined correlation is 0: with one example, or equal predictions or labels. It is NaN if a prediction is not
    finite. ``predicted``: (examples,).
    """
    from scipy.stats import pearsonr, spearmanr

    values = predicted.astype(np.float64)
    wanted = np.array(list(labels), dtype=np.float64)
    mse = float(np.mean((values - wanted) ** 2))
    errors = {"mse": mse, "rmse": math.sqrt(mse), "mae": float(np.mean(np.abs(values - wanted)))}
    if not np.isfinite(values).all():
        return {"pearson": math.nan, "spearman": math.nan, **errors}
    # scipy warns and returns NaN here, which would never be the best of a run's metrics
    if len(values) < 2 or np.ptp(values) == 0 or np.ptp(wanted) == 0:
        return {"pearson": 0.0, "spearman": 0.0, **errors}
    pearson = float(pearsonr(values, wanted).statistic)
    spearman = float(spearmanr(values, wanted).statistic)
    return {"pearson": pearson, "spearman": spearman, **errors}


class Regression(Classification):
    """Outcomes are predictions, (examples, 1) fp32."""

    def __init__(self, evaluation: EvalConfig):
        super().__init__(evaluation)
        self.lower_is_better = evaluation.metric in ("mse", "rmse", "mae")

    def label_names(self, data: DataConfig) -> list[str]:
        return []

    def config_options(self, labels: Sequence[str]) -> dict[str, object]:
        return {"num_labels": 1, "problem_type": "regression"}

    def load(self, data: DataConfig, split: str, tokenizer: "Tokenizer", labels: Sequence[str]) -> Examples:
        rows = read_labelled(data, split)
        where = getattr(data, split)
        if hasattr(rows.features[data.label_column], "names"):
            raise ConfigError(f'{where}: column {data.label_column!r} holds classes. Set task = "classification"')

        def place(row: int) -> str:
            return place_in_split(data, split, rows, row)

        numbers = _numbers(rows[data.label_column], data.label_column, where, place)
        # GLUE's test sets; a single -1 among other numbers is a target
        if set(numbers) == {-1.0}:
            refuse_hidden(-1, place(0), where)
        return Examples(tokenized_texts(rows, data, split, tokenizer), numbers)

    def label_scale(self, examples: Examples) -> tuple[float, float]:
        # labels that are all equal have the deviation 0, by which a head cannot be scaled
        deviation = float(np.std(examples.labels)) or 1.0
        return float(np.mean(examples.labels)), deviation

    def metrics(self, outcomes: np.ndarray, examples: Examples) -> dict[str, float]:
        return regression_metrics(outcomes[:, 0], examples.labels)


TASK = Regression
