"""The table of ``pst-ds bench``."""

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
    ("outside_linear_layers", "outside linears", "{:.0%}"),
    ("output_layer_share", "output layer", "{:.0%}"),
    ("resident_bytes", "resident MB", "{}"),
    ("file_bytes", "file MB", "{}"),
)
"""Key in a row, heading and format of each column."""
_MB = ("resident_bytes", "file_bytes")
Row = dict[str, str | float | None]
"""Results of a variant at a number of threads and a batch size, by the keys of :data:`COLUMNS` and others."""


class Conditions(TypedDict):
    """Conditions of a measurement."""

    dtype: str
    repeats: int
    hardware: str
    last_level_cache_bytes: int
    sparse_kernel: str
    versions: dict[str, str]


class BenchResult(TypedDict):
    """Output of ``pst-ds bench --json``."""

    model: str
    dense: str
    causal: bool
    prompt_tokens: int
    new_tokens: int
    conditions: Conditions
    rows: list[Row]


def bench_text(result: BenchResult) -> str:
    """Format the conditions, and one line for each variant, thread count and batch."""
    conditions = result["conditions"]
    what = f"{result['prompt_tokens']} tokens in" + (f", {result['new_tokens']} out" if result["causal"] else "")
    lines = [
        f"{result['model']} against {result['dense']}: {what}, {conditions['dtype']}, medians of "
        f"{conditions['repeats']} in turn",
        f"{conditions['hardware']}; last-level cache {conditions['last_level_cache_bytes'] / 1e6:.0f} MB; "
        f"sparse kernel: {conditions['sparse_kernel']}; torch {conditions['versions']['torch']}",
    ]
    return "\n".join([*lines, *aligned(bench_table(result["rows"]))])


def bench_table(rows: list[Row]) -> list[list[str]]:
    """Return the headings of the columns that any row has a value for, and the cells of each row."""
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    cells = [[_cell(row.get(key), key, form) for key, _, form in columns] for row in rows]
    return [[heading for _, heading, _ in columns], *cells]


def _cell(value: str | float | None, key: str, form: str) -> str:
    if value is None:
        return "-"
    return f"{float(value) / 1e6:.1f}" if key in _MB else form.format(value)
