"""The printed result of ``pst-ds bench``: conditions, and a line per variant, thread count and batch."""

from __future__ import annotations

from typing import TypedDict

from pst_ds.text_table import aligned

COLUMNS = (
    ("variant", "variant", "{}"),
    ("threads", "threads", "{}"),
    ("batch", "batch", "{}"),
    ("prefill_tokens_per_second", "prefill tok/s", "{:.1f}"),
    ("decode_tokens_per_second", "decode tok/s", "{:.1f}"),
    ("decode_over_dense", "/dense", "{:.2f}"),
    ("decode_over_prepacked", "/prepacked", "{:.2f}"),
    ("prefill_over_dense", "prefill /dense", "{:.2f}"),
    ("prefill_over_prepacked", "prefill /prepacked", "{:.2f}"),
    ("resident_bytes", "resident MB", "{}"),
    ("file_bytes", "file MB", "{}"),
)
"""Key in a row, heading and format of each column."""
Row = dict[str, str | float | None]
"""Results of a variant at a number of threads and a batch size, by the keys of :data:`COLUMNS` and others."""


class Conditions(TypedDict):
    """Conditions of a measurement."""

    dtype: str
    repeats: int
    hardware: str
    sparse_kernel: str
    versions: dict[str, str]


class BenchResult(TypedDict):
    """Output of ``pst-ds bench --json``."""

    model: str
    causal: bool
    prompt_tokens: int
    new_tokens: int
    conditions: Conditions
    rows: list[Row]


def bench_text(result: BenchResult) -> str:
    """Format the conditions, and the columns that any row has a value for."""
    conditions, rows = result["conditions"], result["rows"]
    what = f"{result['prompt_tokens']} tokens in" + (f", {result['new_tokens']} out" if result["causal"] else "")
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    cells = [[_cell(row.get(key), key, form) for key, _, form in columns] for row in rows]
    lines = [
        f"{result['model']}: {what}, {conditions['dtype']}, medians of {conditions['repeats']} in turn",
        f"{conditions['hardware']}; sparse kernel: {conditions['sparse_kernel']}; "
        f"torch {conditions['versions']['torch']}",
    ]
    return "\n".join([*lines, *aligned([[heading for _, heading, _ in columns], *cells])])


def _cell(value: str | float | None, key: str, form: str) -> str:
    if value is None:
        return "-"
    return f"{float(value) / 1e6:.1f}" if key.endswith("_bytes") else form.format(value)
