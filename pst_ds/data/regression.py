"""Texts with a number each: reading the numbers, and how close predictions come."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.labelled import Examples, read_labelled, refuse_hidden, tokenized_texts


def load_scored_texts(data: DataConfig, split: str, tokenizer: Any) -> Examples:
    """The examples of one split, with numbers for labels.

    Raises ConfigError for a missing file or column, and for a label that is no finite number.
    """
    rows, where = read_labelled(data, split), getattr(data, split)
    if hasattr(rows.features[data.label_column], "names"):
        raise ConfigError(f'{where}: column {data.label_column!r} holds classes; set task = "classification"')
    labels = _numbers(rows[data.label_column], data.label_column, where)
    if set(labels) == {-1.0}:
        refuse_hidden(-1, 0, where)
    return Examples(tokenized_texts(rows, data, split, tokenizer), labels)


def _numbers(values: Iterable[Any], column: str, where: str) -> list[float]:
    numbers = []
    for row, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(
                f"{where}: column {column!r} has {value!r} in row {row}; every example needs a finite number"
            )
        numbers.append(number)
    return numbers


def regression_metrics(predicted: np.ndarray, labels: Iterable[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, as scipy computes them, and the mean squared error.

    ``predicted`` is (examples,). A correlation is 0 where it is not defined: with one example, or when all predictions
    or all labels are the same; it is NaN where a prediction is not finite.
    """
    from scipy.stats import pearsonr, spearmanr

    found, wanted = predicted.astype(np.float64), np.array(list(labels), dtype=np.float64)
    mse = float(np.mean((found - wanted) ** 2))
    if not np.isfinite(found).all():
        return {"pearson": math.nan, "spearman": math.nan, "mse": mse}
    if len(found) < 2 or np.ptp(found) == 0 or np.ptp(wanted) == 0:
        return {"pearson": 0.0, "spearman": 0.0, "mse": mse}
    return {
        "pearson": float(pearsonr(found, wanted).statistic),
        "spearman": float(spearmanr(found, wanted).statistic),
        "mse": mse,
    }
