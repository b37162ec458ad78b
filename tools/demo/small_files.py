"""Quantised files of the demo: its sparse runs in int8 and int4, and in ONNX Runtime next to the dense run in int8."""

from __future__ import annotations

import json
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


COMPARED_REVIEWS = "256"
"""Test reviews on which a packed or quantised file is compared with its run; accuracy is measured on all."""
SPEED_TOKENS = 128
"""Tokens of the timed example."""


def small_files(folder: Path, runs: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Measure the dense run in int8, and export and verify the files of the sparse runs."""
    rows = in_onnx_runtime(folder, runs, max_length)
    for run in runs:
        for values, options in SMALL.get(run["name"], {}).items():
            row = small_file(folder / run["name"], values, options, folder / "data" / "test.jsonl")
            rows.append({**row, "accuracy_of_run": run["accuracy"]})
    return rows


def in_onnx_runtime(folder: Path, runs: list[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Measure int8 files in ONNX Runtime: its quantisation of the dense run, and our operators for the sparse runs.

    Times are medians of one example on one thread, in turns.
    """
    test = folder / "data" / "test.jsonl"
    rows = []
    times: dict[str, Callable[[], object]] = {}
    for run in runs:
        name, source = run["name"], Path(run["export_dir"])
        if name == "dense":
            file = onnx_int8.write_int8(source, folder / name / "onnx")
            accuracy, verified = onnx_int8.accuracy(file, source, test, max_length), {}
        elif name.startswith("pst"):
            out = folder / name / "onnx-int8"
            verb("export", str(folder / name), "--format", "onnx", *INT8, "--out", str(out))
            verified = compare(out, folder / name)
            file = out / "model.onnx"
            accuracy = accuracy_of(out, test)
        else:
            continue
        session = open_session(file, threads=1)
        feed = {value.name: np.ones((1, SPEED_TOKENS), np.int64) for value in session.get_inputs()}
        times[name] = partial(session.run, None, feed)
        rows.append({
            "file": f"{name}, ONNX Runtime int8", "file_bytes": file.stat().st_size, "accuracy_of_run": run["accuracy"],
            "accuracy": accuracy,
            "reloaded_equal": verified.get("reloaded_equal"),
        })  # fmt: skip
    for row, seconds in zip(rows, medians(times).values(), strict=True):
        row["ms"] = 1e3 * seconds
    return rows


def small_file(run: Path, values: str, options: list[str], test: Path) -> dict[str, Any]:
    """Export a quantised run, and verify the file against the masked model with the same quantisation scheme."""
    out = run / "small" / values.replace(", ", "-").replace(" ", "-")
    container = "dense" if run.name == "dense" else "bitmask"
    exported = verb("export", str(run), "--format", container, "--dtype", "bf16", *options, "--out", str(out))
    verified = compare(out, run)
    return {
        "file": f"{run.name}, {values}",
        "file_bytes": exported["file_bytes"],
        "bits_per_weight": exported["bits_per_weight"],
        "accuracy": accuracy_of(out, test),
        "reloaded_equal": verified["reloaded_equal"],
    }


def compare(out: Path, run: Path) -> dict[str, Any]:
    """Verify an export against its run on some reviews: each is computed up to six times, by both models."""
    return verb("verify", str(out), "--against", str(run), "--limit", COMPARED_REVIEWS)


def accuracy_of(export: Path, test: Path) -> float:
    """Return the accuracy of an export on the reviews in ``test``, from the labels that `pst-ds predict` writes."""
    predictions = export.with_name(f"{export.name}-predictions.jsonl")
    options = ["--batch", "64", "--threads", "1", "--quiet"]
    verb("predict", str(export), "--data", str(test), "--out", str(predictions), *options)
    labels, answers = ([row["label"] for row in rows_of(file)] for file in (test, predictions))
    return sum(map(str.__eq__, labels, answers)) / len(labels)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
