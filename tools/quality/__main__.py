"""Fill the results table, a grid of methods x sparsities x seeds x data sets, and write tools/quality/logs/results.md.

A grid is a TOML file (tools/quality/encoders.toml, causal.toml). Each cell trains, exports, verifies and tests in its
own process with one thread and a budget of CPU seconds, and becomes a line of tools/quality/logs/results/NAME.jsonl.
Cells that have a line are not run again, so the command can be interrupted and repeated at any time.

    python -m tools.quality tools/quality/encoders.toml --workers 2
    python -m tools.quality tools/quality/encoders.toml --list
    python -m tools.quality tools/quality/encoders.toml --only 'films/pst/0.9' --minutes 30
    python -m tools.quality tools/quality/encoders.toml --report-only

Exit codes: 0 done, 1 a cell failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pst_ds.errors import InputError
from tools.quality.cells import Lines, plan
from tools.quality.grid import Grid, GridError, load_grid
from tools.quality.report import write_report
from tools.quality.workers import Options, run_cells, selected

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("tools/quality/logs/results")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    os.chdir(ROOT)
    try:
        return run(args)
    except InputError as error:
        print(f"quality: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quality: interrupted; finished cells are kept", file=sys.stderr)
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tools.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path, help="TOML file")
    parser.add_argument("--only", default="", metavar="PATTERN", help="start of the cells' names, such as 'films/pst'")
    parser.add_argument("--workers", type=_count, default=1, help="concurrent cells, one thread each (default: 1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after this time")
    parser.add_argument("--retry-failed", action="store_true", help="run failed cells and those over budget again")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of every run"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="lines (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Options.folder, help="where cells run (default: runs/quality)")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--list", action="store_true", help="show the cells and their states; run nothing")
    shown.add_argument("--report-only", action="store_true", help="write the page from the lines; run nothing")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run(args: argparse.Namespace) -> int:
    grid = load_grid(args.grid, args.set)
    lines = Lines(args.results / f"{grid.name}.jsonl")
    if args.list:
        for planned in selected(grid, plan(grid, lines.by_id), args.only):
            print(f"{planned.state:<12}{planned.name}")
        return 0
    failed = 0
    if not args.report_only:
        with stopped_by_signals(), alone(args.folder / f"{grid.name}.lock", grid):
            from tools.quality.texts import make

            make(dict.fromkeys(name for data_set in grid.data_sets.values() for name in data_set.make))
            options = Options(
                only=args.only,
                workers=args.workers,
                minutes=args.minutes,
                retry_failed=args.retry_failed,
                folder=args.folder,
            )
            ended = run_cells(grid, lines, options)
        states = Counter(planned.state for planned in selected(grid, plan(grid, lines.by_id), args.only))
        failed = states["failed"] + states["over budget"]
        print(f"{ended} cells run; " + ", ".join(f"{count} {state}" for state, count in states.items()))
    print(f"{write_report(grids_of_page(args.grid, grid), args.results)} written")
    return 1 if failed else 0


def grids_of_page(path: Path, grid: Grid) -> list[Grid]:
    """Return ``grid``, together with all others of the project if it is one of them: they share a page."""
    folder = ROOT / "tools" / "quality"
    paths = folder.glob("*.toml") if path.resolve().parent == folder else []
    others = [load_grid(other.relative_to(ROOT)) for other in paths if other != path.resolve()]
    return sorted([grid, *others], key=lambda g: Path(g.path).name)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and SIGTERM within the block, so that children are ended."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def alone(path: Path, grid: Grid) -> Iterator[None]:
    """Hold a lock that lets one process run a grid's cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GridError(f"another process is running the cells of grid {grid.name!r}. Wait for it") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
