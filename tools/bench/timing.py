"""Medians of interleaved runs, so that two candidates see the same machine; and the conditions they ran under."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pst_ds.core.kernels.host import cpu_name


def medians(
    candidates: dict[str, Callable[[], object]],
    repeats: int = 15,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each candidate; they take turns."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the wall-clock seconds of the block, until an accelerator is done too, as ``name``, and the processor's as
    ``cpu_name``: other work on the machine disturbs those less.
    """
    cpu, start = time.process_time(), time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start
    seconds[f"cpu_{name}"] = time.process_time() - cpu


def status_bytes(field: str) -> int:
    """Memory of this process by /proc/self/status: "VmRSS" is resident now, "VmHWM" the peak of that."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def hardware() -> str:
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu_name()}, {os.cpu_count()} cores{card}"


def conditions(**stated: Any) -> dict[str, Any]:
    """Hardware, versions and threads, beside what the benchmark states: shapes, dtype, ranks, repeats."""
    found = {}
    for package in ("torch", "deepspeed", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {"hardware": hardware(), "threads_per_rank": 1, "versions": found, **stated}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_json(result: dict[str, Any]) -> None:
    """The last line of stdout: one object, floats to four significant digits."""
    print(json.dumps(rounded(result)))


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value
