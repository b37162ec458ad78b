"""The last table of the demo: its sparse runs in few bits, beside the dense run in ONNX Runtime's int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools import onnx_int8
from tools.verbs import verb

SMALL: dict[str, dict[str, list[str]]] = {
    "dense": {"int4": ["--values", "int4", "--embeddings", "int4"]},
    "pst-50": {"int4": ["--values", "int4", "--embeddings", "int4"]},
    "pst-90": {
        "int8": ["--values", "int8", "--embeddings", "int8"],
        "int4": ["--values", "int4", "--embeddings", "int4"],
        "int4, tokens seen": ["--values", "int4", "--embeddings", "int4", "--vocabulary", "seen"],
    },
}
"""The small files of each run, and what `pst-ds export` is given for them; norms and biases are in bf16."""


def small_files(folder: Path, runs: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Measure the dense run in int8, and export and verify the small files of the sparse ones."""
    rows = []
    for run in runs:
        if run["name"] == "dense":
            found = onnx_int8.measure(
                Path(run["export_dir"]), folder / "dense" / "onnx", folder / "data/test.jsonl", max_length
            )
            rows.append({"file": "dense, ONNX Runtime int8", **found, "accuracy_of_run": run["accuracy"]})
        for values, options in SMALL.get(run["name"], {}).items():
            found = small_file(folder / run["name"], values, options)
            rows.append({**found, "accuracy_of_run": run["accuracy"]})
    return rows


def small_file(run: Path, values: str, options: list[str]) -> dict[str, Any]:
    """Export a run with few bits, and hold the file against the masked model on the same grid."""
    out = run / "small" / values.replace(", ", "-").replace(" ", "-")
    container = "dense" if run.name == "dense" else "bitmask"
    exported = verb("export", str(run), "--format", container, "--dtype", "bf16", *options, "--out", str(out))
    verified = verb("verify", str(out), "--against", str(run))
    return {
        "file": f"{run.name}, {values}",
        "file_bytes": exported["file_bytes"],
        "bits_per_weight": exported["bits_per_weight"],
        "accuracy": verified["metrics"]["accuracy"],
        "reloaded_equal": verified["reloaded_equal"],
    }
