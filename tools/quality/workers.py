"""Run the cells of a grid in separate processes, and write a line for each finished cell."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pst_ds.file_names import CHECKPOINTS, START
from pst_ds.progress import Progress
from tools.machine import kind_of_processor
from tools.quality.cells import Cell, Line, Lines, Planned, State, plan
from tools.quality.grid import Grid, Method
from tools.quality.run_cell import FILES, OUTCOME

ROOT = Path(__file__).resolve().parents[2]
_LOOK_SECONDS, _LINE_SECONDS = 0.2, 600.0
_WALL_FACTOR = 10.0
"""Multiple of the budget of CPU seconds after which, by the clock, a cell is ended."""
_WALL_LEAST = 600.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the runner."""

    only: str = ""
    """Shell pattern of the cells' names or their beginnings; the tries that they need run too."""
    workers: int = 1
    minutes: float = float("inf")
    """Minutes after which no cell starts."""
    retry_failed: bool = False
    folder: Path = Path("runs/quality")


@dataclass(slots=True)
class Job:
    """A running cell."""

    cell: Cell
    process: subprocess.Popen[bytes]
    folder: Path
    started: float


def selected(grid: Grid, planned: list[Planned], only: str) -> list[Planned]:
    """Return the cells that ``only`` matches, and the tries that these wait for."""
    if not only:
        return planned
    names = {p.name for p in planned if fnmatch.fnmatch(p.name, only) or fnmatch.fnmatch(p.name, f"{only}*")}
    needed: set[tuple[str, str]] = set()
    for p in planned:
        if p.name in names and not p.is_search:
            needed |= _searches(grid, p.data_set, grid.methods[p.method])
    return [p for p in planned if p.name in names or (p.is_search and (p.data_set, p.method) in needed)]


def _searches(grid: Grid, data_set: str, method: Method) -> set[tuple[str, str]]:
    """Return (data set, method) of the searches that precede a method's cells."""
    found = {(grid.searched_data_set(data_set), method.tries_of or method.name)}
    return found | (_searches(grid, data_set, grid.methods[method.teacher]) if method.teacher else set())


def run_cells(grid: Grid, lines: Lines, options: Options) -> int:
    """Run the remaining cells in order. Return the number of finished ones. Children end if this is interrupted."""
    deadline = time.monotonic() + 60 * options.minutes
    running: list[Job] = []
    begun: set[str] = set()
    ended = 0
    to_do = sum(p.state in {"waits", *_wanted(options)} for p in selected(grid, plan(grid, lines.by_id), options.only))
    shown = Progress("cells", to_do, line_seconds=_LINE_SECONDS)
    try:
        while True:
            while len(running) < options.workers and time.monotonic() < deadline:
                cell = next_cell(grid, lines, options, begun)
                if cell is None:
                    break
                begun.add(cell.id)
                running.append(start(grid, cell, options.folder))
            if not running:
                return ended
            shown.at(ended, ", ".join(job.cell.name for job in running))
            time.sleep(_LOOK_SECONDS)
            for job in list(running):
                line = outcome_of(grid, job, options)
                if line is not None:
                    running.remove(job)
                    ended += 1
                    lines.put(line)
                    print(said_of(line, grid), flush=True)
    finally:
        shown.close()
        for job in running:
            _kill(job)
            job.process.wait()
            clean_up(job.folder)


def next_cell(grid: Grid, lines: Lines, options: Options, begun: set[str]) -> Cell | None:
    """Return the first remaining cell that was not started in this session."""
    for planned in selected(grid, plan(grid, lines.by_id), options.only):
        if planned.cell is not None and planned.state in _wanted(options) and planned.cell.id not in begun:
            return planned.cell
    return None


def _wanted(options: Options) -> set[State]:
    return {"to do", "failed", "over budget"} if options.retry_failed else {"to do"}


def start(grid: Grid, cell: Cell, folder: Path) -> Job:
    """Start a cell with one thread, in a new folder."""
    place = folder / "cells" / cell.id
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    steps = {name: step for name, step in (("base", cell.base), ("teacher", cell.teacher)) if step is not None}
    spec = {
        "name": cell.name,
        "settings": cell.settings,
        "tests": cell.tests,
        "reference": cell.reference,
        "train": cell.train,
        "shallow": cell.shallow,
        "steps": {n: {"id": s.id, "settings": s.settings, "prune": s.prune} for n, s in steps.items()},
        "cpu_seconds": grid.cpu_seconds,
        "verify_examples": grid.verify_examples,
        "files": files_spec(grid, cell),
    }
    (place / "spec.json").write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environ.get("PYTHONPATH")])])
    with (place / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.quality.run_cell", str(place / "spec.json")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            start_new_session=True,
        )
    return Job(cell, process, place, time.monotonic())


def files_spec(grid: Grid, cell: Cell) -> dict[str, Any]:
    """Return what the cell writes in addition to its dense export; empty for nothing."""
    if not cell.train or not cell.tests or cell.data_set not in (grid.files.data_sets or grid.data_sets):
        return {}
    return {"export": grid.files.export, "peers": grid.files.peers, "has_zeros": cell.sparsity != "0"}


def outcome_of(grid: Grid, job: Job, options: Options) -> Line | None:
    """Return the line of a finished job; None while it runs."""
    pid, status, usage = os.wait4(job.process.pid, os.WNOHANG)
    wall = time.monotonic() - job.started
    stalled = False
    if pid == 0:
        if wall < max(_WALL_LEAST, _WALL_FACTOR * grid.cpu_seconds):
            return None
        stalled = True
        _kill(job)
        _, status, usage = os.wait4(job.process.pid, 0)
    job.process.returncode = os.waitstatus_to_exitcode(status)
    measured = {
        "outcome": "failed",
        "seconds": round(wall, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        **_told(job, grid, stalled),
    }
    clean_up(job.folder)
    cell = job.cell
    return {
        "id": cell.id,
        "grid": grid.name,
        "name": cell.name,
        "kind": cell.kind,
        "data_set": cell.data_set,
        "method": cell.method,
        "sparsity": cell.sparsity,
        "seed": cell.seed,
        "try": cell.attempt,
        "settings": cell.settings,
        "base": cell.base.prune if cell.base else None,
        "budget_cpu_seconds": grid.cpu_seconds,
        "workers": options.workers,
        "machine": kind_of_processor(),
        "date": date.today().isoformat(),
        **measured,
    }


def _told(job: Job, grid: Grid, stalled: bool) -> Line:
    """Return the outcome that the process wrote, or why there is none."""
    told = job.folder / OUTCOME
    if told.is_file():
        outcome: Line = json.loads(told.read_text(encoding="utf-8"))
        return outcome
    code = job.process.returncode
    if stalled:
        return {"error": "it stalled and was ended"}
    if code == -signal.SIGXCPU:
        return {"outcome": "over budget", "error": f"more than {grid.cpu_seconds:g} CPU seconds"}
    if code < 0:
        return {"error": f"ended by {signal.Signals(-code).name}"}
    return {"error": f"exit code {code}: {last_line(job.folder / 'log.txt')}"}


def last_line(log: Path) -> str:
    written = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return written[-1][:500] if written else "nothing was written"


def said_of(line: Line, grid: Grid) -> str:
    """Return one line for the terminal."""
    if line["outcome"] != "done":
        return f"{line['name']}: {line['outcome']} after {line['cpu_seconds']:.0f} CPU s: {line.get('error', '')}"
    tests = ",".join(f" {name} {metrics[grid.metric]:.4g}" for name, metrics in line["tests"].items())
    validation = line["validation"].get(grid.metric)
    chosen_by = "" if validation is None else f" (validation {validation:.4g})"
    return (
        f"{line['name']}: {grid.metric}{tests}{chosen_by}, {line['sparsity_measured']:.4f} sparsity, "
        f"{line['cpu_seconds']:.0f} CPU s"
    )


def clean_up(folder: Path) -> None:
    """Remove models, checkpoints and exports from a cell's folder. Metrics and the run file stay."""
    of_run = (folder / "run" / name for name in (START, CHECKPOINTS, "tensorboard"))
    for path in (*of_run, folder / "export", folder / FILES):
        shutil.rmtree(path, ignore_errors=True)


def _kill(job: Job) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(job.process.pid, signal.SIGKILL)
