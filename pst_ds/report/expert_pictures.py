"""Heat maps of experts, as the page shows them: training tokens and sparsity of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pst_ds.core.experts.tokens import of_equal_numbers, shares_of_zeros
from pst_ds.report.layer_pictures import HeatMap, column_ticks, packed, png_uri
from pst_ds.report.run_data import RunData
from pst_ds.train.monitor.images import shaded, share_on_scale


def expert_maps(run: RunData) -> Iterator[HeatMap]:
    """Yield the maps of tokens and of sparsity, if the run has ended and counted them; one for each number of
    experts.
    """
    for table in _tables(run, "expert_tokens"):
        rows = np.array(list(table.values()), dtype=float)
        relative = rows / np.maximum(rows.mean(1, keepdims=True), 1e-9)
        on_scale = np.concatenate([share_on_scale([row]) for row in rows])
        yield _map("Tokens of experts", "over the mean of their module", table, relative, on_scale, ("0", "2 or more"))
    weights = dict(zip(run.layers.names, run.layers.weights, strict=True)) if run.layers else {}
    for table in _tables(run, "expert_zeros"):
        known = {name: row for name, row in table.items() if weights.get(name)}
        if known:
            share = np.array([shares_of_zeros(row, weights[name]) for name, row in known.items()])
            yield _map("Zeros of experts", "share of zeros", known, share, share, ("0", "1"))


def _tables(run: RunData, key: str) -> list[dict[str, Sequence[int]]]:
    counts = run.result.get(key)
    return of_equal_numbers(counts) if isinstance(counts, dict) else []


def _map(
    title: str,
    note: str,
    table: Mapping[str, Sequence[int]],
    values: np.ndarray,
    on_scale: np.ndarray,
    scale: tuple[str, str],
) -> HeatMap:
    numbers = range(values.shape[1])
    return HeatMap(
        title,
        note,
        png_uri(shaded(on_scale)),
        scale,
        column_ticks(numbers),
        list(table),
        [str(i) for i in numbers],
        packed(values),
        "expert",
    )
