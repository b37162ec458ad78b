"""What benchmarks share: options, interleaved timing, conditions and printed results."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pst_ds.config.toml import flatten
from tools.machine import hardware


def benchmark_parser(doc: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser that shows ``doc`` unchanged in its help and has the option --json."""
    parser = argparse.ArgumentParser(prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return parser


def medians(
    candidates: dict[str, Callable[[], object]],
    repeats: int = 15,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median seconds of each candidate. They run in turns, so that all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, run in candidates.items():
            start = clock()
            run()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def medians_of(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median over ``rounds`` of each of their keys, which are all those of the first."""
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Put the block's seconds into ``seconds``: wall time as ``name``, CPU time as ``cpu_name``.

    Wall time includes waiting for the accelerator. CPU time is less sensitive to other work on the machine.
    """
    cpu, start = time.process_time(), time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[name] = time.perf_counter() - start
    seconds[f"cpu_{name}"] = time.process_time() - cpu


def status_bytes(field: str) -> int:
    """Return this process's memory from /proc/self/status: "VmRSS" is resident now, "VmHWM" its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def conditions(**stated: Any) -> dict[str, Any]:
    """Return hardware, versions and threads, together with what the benchmark states: shapes, dtype, repeats."""
    found = {}
    for package in ("torch", "deepspeed", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {"hardware": hardware(), "threads_per_rank": 1, "versions": found, **stated}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_result(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a benchmark's result, floats to four significant digits: one JSON object, or lines and tables."""
    if as_json:
        print(json.dumps(rounded(result)))
        return
    for name, value in flatten(rounded(result)).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = [flatten(row) for row in value]
            head = list(dict.fromkeys(column for row in rows for column in row))
            print_table(head, [[str(row.get(column, "-")) for column in head] for row in rows])
        else:
            print(f"{name}: {value}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns after an empty line."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print()
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value
