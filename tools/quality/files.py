"""Files of a finished cell, and those of other programs: the bytes of each, and its metrics on the test files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tools import onnx_int8, torchao_files
from tools.verbs import verb

Table = dict[str, Any]
Tests = dict[str, dict[str, float]]
FOLDER = "files"
"""Beside the run; removed when the cell has ended."""


def measure_files(spec: Table, run: Path, dense: Path, tested: Callable[[Path], Tests]) -> dict[str, Table]:
    """Write and test the files that ``spec`` names of the run in the folder ``run``, whose dense export is ``dense``.

    ``tested`` gives the metrics of a model folder on each test file.
    """
    container = "bitmask" if spec["has_zeros"] else "dense"
    found = {}
    for name, options in spec["export"].items():
        out = run.parent / FOLDER / name
        exported = verb("export", str(run), "--format", container, *options, "--out", str(out))
        found[name] = {"bytes": exported["file_bytes"], "tests": tested(out)}
    if not spec["has_zeros"]:
        for name in spec["peers"]:
            found[name] = PEERS[name](dense, run.parent / FOLDER / name, spec["tests"], spec["max_length"])
    return found


def onnxruntime_int8(dense: Path, out: Path, tests: dict[str, str], max_length: int) -> Table:
    file = onnx_int8.write_int8(dense, out)
    right = {name: onnx_int8.accuracy(file, dense, Path(path), max_length) for name, path in tests.items()}
    return {"bytes": file.stat().st_size, "tests": {name: {"accuracy": share} for name, share in right.items()}}


def torchao(bits: int, dense: Path, out: Path, tests: dict[str, str], max_length: int) -> Table:
    found = {name: torchao_files.measure(dense, out, Path(path), max_length, bits) for name, path in tests.items()}
    nbytes = next(iter(found.values()))["file_bytes"]
    return {"bytes": nbytes, "tests": {name: {"accuracy": row["accuracy"]} for name, row in found.items()}}


PEERS: dict[str, Callable[[Path, Path, dict[str, str], int], Table]] = {
    "ONNX Runtime int8": onnxruntime_int8,
    "torchao int8": partial(torchao, 8),
    "torchao int4": partial(torchao, 4),
}
"""What ``files.peers`` may name: (dense folder, folder to write, test files, most tokens) to bytes and tests."""
