"""Exports in a report: their formats, sparsity and sizes."""

from __future__ import annotations

import json
import math
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
    """Read an export's manifest and the sizes of its files. Raises InputError if it is missing or damaged."""
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
        pruned = sum(math.prod(t["shape"]) for t in sparse)
        weights = sum(math.prod(t["shape"]) for t in tensors)
        nbytes = sum((folder / Path(file).name).stat().st_size for file in files)
        error = manifest.get("largest_rounding_error")
        return {
            "format": " ".join(str(manifest[key]) for key in ("kind", "values", "embeddings") if key in manifest),
            "step": manifest.get("step"),
            "sparsity requested": manifest.get("sparsity_requested"),
            "measured": 1.0 - sum(t["nonzero"] for t in sparse) / pruned if pruned else None,
            "weight files": bytes_text(nbytes),
            "of dense bf16": f"{nbytes / (2 * weights):.3f}" if weights else None,
            "bits per weight": f"{8 * nbytes / weights:.2f}" if weights else None,
            "largest quantisation error": None if error is None else f"{error:.2%}",
        }
    except (KeyError, TypeError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Run pst-ds verify for details") from None
