"""Outcomes of runs: exports and their sizes, speed, verification, and trials of ``pst-ds tune``."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from pst_ds.atomic_files import PARTIAL
from pst_ds.errors import InputError
from pst_ds.file_names import MANIFEST_FILE, TUNE_FILE
from pst_ds.report.charts import whole
from pst_ds.report.run_data import RunData
from pst_ds.report.tables import Cell, Table, number
from pst_ds.text_table import aligned, bytes_text
from pst_ds.train.tune.report import trial_table, why

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
_MB = ("resident_bytes", "file_bytes")
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


@dataclass(frozen=True, slots=True)
class ExportData:
    """An export folder, from its manifest and the sizes of its files."""

    name: str
    kind: str
    step: int | None
    sparsity_requested: float | None
    sparsity_measured: float | None
    """Sparsity of the pruned tensors."""
    weight_bytes: int
    """Size of the weight files."""
    dense_bytes: int
    """Size of the same model, dense in bf16."""
    shapes: dict[tuple[str, int], list[int]]
    """Shapes of the pruned tensors, by module and number of weights."""
    largest_rounding_error: float | None = None
    """Largest relative quantisation error of a tensor."""


def find_exports(runs: Sequence[RunData], others: Sequence[Path]) -> tuple[list[ExportData], list[str]]:
    """Read the exports in the run folders, and ``others``. Returns the exports, and notes on damaged ones in runs.

    Raises InputError if one of ``others`` is not an export.
    """
    found = [(run, path.parent) for run in runs for path in sorted(run.folder.glob(f"*/{MANIFEST_FILE}"))]
    inside = [(run, folder) for run, folder in found if folder.suffix != PARTIAL]
    exports: list[ExportData] = []
    notes: list[str] = []
    named = {path.resolve() for path in others}
    for run, folder in inside:
        try:
            exports.append(read_export(folder, f"{run.name}/{folder.name}"))
        except InputError as error:
            if folder.resolve() in named:
                raise
            notes.append(f"{run.name}/{folder.name} is omitted: {error}")
    known = {folder.resolve() for _, folder in inside}
    return exports + [read_export(path, str(path)) for path in others if path.resolve() not in known], notes


def read_export(folder: Path, name: str) -> ExportData:
    """Read an export's manifest. Raises InputError if it is missing or damaged."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(
            f"{str(folder)!r} is not an export: {MANIFEST_FILE} is missing. Name a folder written by pst-ds export"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        tensors = manifest["tensors"]
        files = {part["file"] for tensor in tensors for part in tensor["parts"]}
        # if another tool pruned the model, the linear weights that have pruned entries
        sparse = [t for t in tensors if t["origin"] == "pruned"] or [t for t in tensors if t["pattern"] != "dense"]
        weights = sum(math.prod(t["shape"]) for t in sparse)
        return ExportData(
            name=name,
            kind=" ".join([manifest["kind"], *(str(manifest[k]) for k in ("values", "embeddings") if k in manifest)]),
            step=manifest.get("step"),
            sparsity_requested=manifest.get("sparsity_requested"),
            sparsity_measured=1.0 - sum(t["nonzero"] for t in sparse) / weights if weights else None,
            weight_bytes=sum((folder / Path(file).name).stat().st_size for file in files),
            dense_bytes=2 * sum(math.prod(t["shape"]) for t in tensors),
            shapes={(t["name"].removesuffix(".weight"), math.prod(t["shape"])): t["shape"] for t in sparse},
            largest_rounding_error=manifest.get("largest_rounding_error"),
        )
    except (KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Run pst-ds verify for details") from None


def export_table(exports: Sequence[ExportData], notes: Sequence[str] = ()) -> Table | None:
    if not exports:
        return None
    is_rounded = any(export.largest_rounding_error is not None for export in exports)
    rows = [
        [
            Cell(export.name),
            Cell(export.kind),
            number(export.step, whole),
            number(export.sparsity_requested),
            number(export.sparsity_measured, "{:.6f}".format),
            number(export.weight_bytes, bytes_text),
            number(export.weight_bytes / export.dense_bytes if export.dense_bytes else None, "{:.3f}".format),
            number(16 * export.weight_bytes / export.dense_bytes if export.dense_bytes else None, "{:.2f}".format),
            *([number(export.largest_rounding_error, "{:.2%}".format)] if is_rounded else []),
        ]
        for export in exports
    ]
    head = ["export", "format", "step", "sparsity requested", "measured", "weight files", "of dense bf16"]
    head += ["bits per weight", *(["largest quantisation error"] if is_rounded else [])]
    return Table("Exports", head, rows, note="; ".join(notes))


def _cells(rows: Sequence[Sequence[str]]) -> list[list[Cell]]:
    """Return the cells of a printed table, in which "-" is a missing value."""
    return [[Cell(row[0]), *(number(None) if c in "-" else Cell(c, _key(c)) for c in row[1:])] for row in rows]


def tuning_tables(runs: Sequence[RunData]) -> Iterator[Table]:
    """Yield a table of each search. Raises InputError for a damaged file."""
    for run in runs:
        path = run.folder / TUNE_FILE
        if not path.is_file():
            continue
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            head, *rows = trial_table(lines)
            note = why(lines) if lines[-1]["event"] == "choice" else "not finished; the same command resumes it"
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise InputError(f"{path} is damaged: {error!r}. Remove it, or tune again with --restart") from None
        title = f"Learning rates tried{f' for {run.name}' if len(runs) > 1 else ''}"
        yield Table(title, head, _cells(rows), note=note)


def _key(text: str) -> float | None:
    try:
        return float(text.rstrip("%"))
    except ValueError:
        return None


def bench_text(result: BenchResult) -> str:
    """Format the conditions, and one line for each variant, thread count and batch."""
    conditions = result["conditions"]
    what = f"{result['prompt_tokens']} tokens in" + (f", {result['new_tokens']} out" if result["causal"] else "")
    lines = [
        f"{result['model']}: {what}, {conditions['dtype']}, medians of {conditions['repeats']} in turn",
        f"{conditions['hardware']}; sparse kernel: {conditions['sparse_kernel']}; "
        f"torch {conditions['versions']['torch']}",
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
