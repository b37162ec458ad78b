"""Quantised files of the demo: its sparse runs in int8 and int4, and in ONNX Runtime next to the dense run in int8."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pst_ds.inference.onnx.operators import open_session
from tools import onnx_int8
from tools.bench.timing import medians
from tools.verbs import verb

INT8 = ["--dtype", "bf16", "--values", "int8", "--embeddings", "int8"]
SMALL: dict[str, dict[str, list[str]]] = {
    "dense": {"int4": ["--values", "int4", "--embeddings", "int4"]},
    "pst-50": {"int4": ["--values", "int4", "--embeddings", "int4"]},
    "pst-90": {
        "int8": INT8[2:],
        "int4": ["--values", "int4", "--embeddings", "int4"],
        "int4, tokens seen": ["--values", "int4", "--embeddings", "int4", "--vocabulary", "seen"],
    },
}
"""Options of `pst-ds export` for the files of each run; norms and biases are in bf16."""


SPEED_TOKENS = 128
"""Tokens of the timed example."""


def small_files(folder: Path, runs: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Measure the dense run in int8, and export and verify the files of the sparse runs."""
    rows = in_onnx_runtime(folder, runs, max_length)
    for run in runs:
        for values, options in SMALL.get(run["name"], {}).items():
            rows.append({**small_file(folder / run["name"], values, options), "accuracy_of_run": run["accuracy"]})
    return rows


def in_onnx_runtime(folder: Path, runs: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Measure int8 files in ONNX Runtime: its quantisation of the dense run, and our operators for the sparse runs.

    Times are medians of one example on one thread, in turns.
    """
    texts, rows = folder / "data" / "test.jsonl", []
    times: dict[str, Callable[[], object]] = {}
    for run in runs:
        name, source = run["name"], Path(run["export_dir"])
        if name == "dense":
            file, verified = onnx_int8.write_int8(source, folder / name / "onnx"), {}
        elif name.startswith("pst"):
            out = folder / name / "onnx-int8"
            verb("export", str(folder / name), "--format", "onnx", *INT8, "--out", str(out))
            verified = verb("verify", str(out), "--against", str(folder / name))
            file = out / "model.onnx"
        else:
            continue
        session = open_session(file, threads=1)
        feed = {value.name: np.ones((1, SPEED_TOKENS), np.int64) for value in session.get_inputs()}
        times[name] = partial(session.run, None, feed)
        rows.append({
            "file": f"{name}, ONNX Runtime int8", "file_bytes": file.stat().st_size, "accuracy_of_run": run["accuracy"],
            "accuracy": onnx_int8.accuracy(file, source, texts, max_length),
            "reloaded_equal": verified.get("reloaded_equal"),
        })  # fmt: skip
    for row, seconds in zip(rows, medians(times).values(), strict=True):
        row["ms"] = 1e3 * seconds
    return rows


def small_file(run: Path, values: str, options: list[str]) -> dict[str, Any]:
    """Export a quantised run, and verify the file against the masked model with the same quantisation scheme."""
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
