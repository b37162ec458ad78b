"""Exports in a report: their formats, sparsity and sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pst_ds.atomic_files import PARTIAL
from pst_ds.errors import InputError
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.report.run_data import RunData
from pst_ds.text_table import bytes_text

Exports = dict[str, dict[str, object]]
"""Facts about exports by heading, for every export by name."""


def find_exports(runs: Sequence[RunData], others: Sequence[Path]) -> tuple[Exports, list[str]]:
    """Read the exports in the run folders, and ``others``. Returns the exports, and notes on damaged ones in runs.

    Raises InputError if one of ``others`` is not an export.
    """
    found = [(run, path.parent) for run in runs for path in sorted(run.folder.glob(f"*/{MANIFEST_FILE}"))]
    names = {folder.resolve(): f"{run.name}/{folder.name}" for run, folder in found if folder.suffix != PARTIAL}
    exports, notes = {}, []
    for folder in dict.fromkeys([*names, *(path.resolve() for path in others)]):
        name = names.get(folder) or next(str(path) for path in others if path.resolve() == folder)
        try:
            exports[name] = read_export(folder)
        except InputError as error:
            if folder in {path.resolve() for path in others}:
                raise
            notes.append(f"{name} is omitted: {error}")
    return exports, notes


def read_export(folder: Path) -> dict[str, object]:
    """Read the facts in an export's manifest. Raises InputError if it is missing or damaged."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(
            f"{str(folder)!r} is not an export: {MANIFEST_FILE} is missing. Name a folder written by pst-ds export"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        size, dense = facts["file_bytes"], facts["dense_bf16_bytes"]
        error = facts.get("largest_rounding_error")
        return {
            "format": " ".join(str(facts[key]) for key in ("kind", "values", "embeddings") if key in facts),
            "step": facts.get("step"),
            "sparsity requested": facts.get("sparsity_requested"),
            "measured": facts["sparsity_measured"],
            "weight files": bytes_text(size),
            "of dense bf16": f"{size / dense:.3f}" if dense else None,
            "bits per weight": f"{16 * size / dense:.2f}" if dense else None,
            "largest quantisation error": None if error is None else f"{error:.2%}",
        }
    except (KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Run pst-ds verify for details") from None
