"""Run the test suite in six stages. A stage that fails does not stop the others; one summary ends the run.

    python -m tools.run_tests --scope quick                  # make test: every promise of the documentation once
    python -m tools.run_tests --scope all                    # make test-all: all tests, more examples of each property
    python -m tools.run_tests --scope quick --only kernels   # make test ONLY=kernels

Exits with 0, with 1 if a stage failed, and with 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

PYTEST_NO_TESTS = 5
"""Exit code of pytest where no test has the marks of a stage: its marks or its files are wrong."""
INTERRUPTED = 130
APART = (Path("tests/device"), Path("tests/kernels"))
"""Folders of stages that have processes of their own, which alone may import the emulated device."""
FAILED_BEFORE = Path(".pytest_cache/v/cache/lastfailed")
"""Where pytest keeps the names of failed tests, over all processes since the file was removed."""
SCOPES = {"quick": ("not thorough", "quick"), "all": ("", "thorough")}
"""Marks of the tests that run, and the Hypothesis profile."""


@dataclass(frozen=True)
class Stage:
    """Tests that share processes."""

    name: str
    marks: str
    """pytest's expression for the marks of its tests."""
    paths: tuple[str, ...] = ("tests",)
    one_of: tuple[str, ...] = ()
    """Marks of which each of its tests has at least one. pytest collects only the files that name one of them."""
    workers: str | None = "unit"
    """Which option has the number of processes: "unit" or "rank"; None for no processes but pytest's."""
    environment: dict[str, str] = field(default_factory=dict)


STAGES = (
    # no process can fork ranks once a backward pass has used the emulated device, so these have processes of their own
    Stage("device-ranks", "device and zero3", paths=("tests/device",), workers="rank"),
    Stage("device", "device and not zero3", paths=("tests/device",), workers="rank"),
    # triton reads the variable when it is imported
    Stage("kernels", "interpreted", paths=("tests/kernels",), environment={"TRITON_INTERPRET": "1"}),
    Stage("units", "not (zero3 or launcher or cluster or device or interpreted)"),
    Stage("ranks", "zero3 and not (launcher or cluster or device)", one_of=("zero3",), workers="rank"),
    # launchers take ports and look at processes: one test at a time, and last
    Stage("launchers", "launcher or cluster", one_of=("launcher", "cluster"), workers=None),
)


@dataclass(frozen=True)
class Outcome:
    """A stage that ran."""

    stage: Stage
    code: int
    """Exit code of pytest."""
    seconds: float

    @property
    def failed(self) -> bool:
        return self.code != 0

    @property
    def words(self) -> str:
        if self.code == PYTEST_NO_TESTS:
            return "no tests"
        return "failed" if self.failed else "passed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages that the command line names, print the summary, and return the exit code."""
    parser = argparse.ArgumentParser("python -m tools.run_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--scope", choices=SCOPES, default="quick", help="which tests of each stage (default: quick)")
    parser.add_argument(
        "--only", nargs="+", choices=[stage.name for stage in STAGES], metavar="STAGE",
        help=f"some stages: {', '.join(stage.name for stage in STAGES)}",
    )  # fmt: skip
    parser.add_argument("--unit-workers", type=int, default=2, help="processes of unit tests, each of up to 8 GiB")
    parser.add_argument("--rank-workers", type=int, default=2, help="processes of tests that fork ranks")
    args = parser.parse_args(arguments)

    workers = {"unit": args.unit_workers, "rank": args.rank_workers}
    stages = [stage for stage in STAGES if not args.only or stage.name in args.only]
    FAILED_BEFORE.unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    try:
        for stage in stages:
            print(f"\n== {stage.name} ({len(outcomes) + 1} of {len(stages)}) ==", flush=True)
            started = time.monotonic()
            code = run_until_end(pytest_command(stage, args.scope, workers), stage.environment)
            outcomes.append(Outcome(stage, code, time.monotonic() - started))
    except KeyboardInterrupt:
        print(summary(outcomes, failed_tests(), args.scope))
        print(f"stopped in stage {stages[len(outcomes)].name}", flush=True)
        return INTERRUPTED
    print(summary(outcomes, failed_tests(), args.scope), flush=True)
    return int(any(outcome.failed for outcome in outcomes))


def pytest_command(stage: Stage, scope: str, workers: dict[str, int], python: str = sys.executable) -> list[str]:
    """Return the command that runs the tests of ``stage`` that ``scope`` includes."""
    marks, profile = SCOPES[scope]
    expression = f"({stage.marks}) and ({marks})" if marks else stage.marks
    command = [python, "-m", "pytest", "-m", expression, *collected(stage), "--hypothesis-profile", profile]
    if stage.workers:
        command += ["--numprocesses", str(workers[stage.workers]), "--dist", "worksteal"]
    return command


def collected(stage: Stage) -> list[str]:
    """Return the folders or files that pytest collects for ``stage``: importing the other files takes seconds.

    tests/conftest.py refuses a test whose file does not name the test's mark. Files in the folders APART are left out:
    their import makes the emulated device the machine's, and pytest collects a file that is named even where its
    conftest.py says not to.
    """
    if not stage.one_of:
        return list(stage.paths)
    files = [path for folder in stage.paths for path in sorted(Path(folder).rglob("test_*.py"))]
    files = [path for path in files if not any(map(path.is_relative_to, APART))]
    names = [f"mark.{mark}" for mark in stage.one_of]
    return [str(path) for path in files if any(name in path.read_text(encoding="utf-8") for name in names)]


def run_until_end(command: list[str], environment: dict[str, str]) -> int:
    """Run a command and return its exit code. After Ctrl-C or SIGTERM, wait until it has cleaned up, then raise.

    ``subprocess.run`` would kill pytest a quarter of a second after Ctrl-C, and leave what its tests started.
    """
    process = subprocess.Popen(command, env={**os.environ, **environment})

    def stop(signum: int, frame: FrameType | None) -> None:
        process.send_signal(signal.SIGINT)  # a terminal sends Ctrl-C to both processes, but SIGTERM is for this one
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def failed_tests() -> list[str]:
    """Return the names of the tests that failed, and of files that pytest could not collect."""
    with suppress(FileNotFoundError):
        return sorted(json.loads(FAILED_BEFORE.read_text(encoding="utf-8")))
    return []


def summary(outcomes: list[Outcome], tests: list[str], scope: str) -> str:
    """Return a line for each stage, the tests that failed, and how to run a failed stage again."""
    lines = ["", "== summary =="]
    lines += [f"{o.stage.name:<14}{o.words:<10}{o.seconds:>7.0f} s" for o in outcomes]
    lines.append(f"{'all':<24}{sum(outcome.seconds for outcome in outcomes):>7.0f} s")
    failed = [outcome.stage.name for outcome in outcomes if outcome.failed]
    if failed:
        target = "test" if scope == "quick" else "test-all"
        lines += [f"FAILED {name}" for name in tests]
        lines.append(
            f'{len(failed)} of {len(outcomes)} stages failed. Run them again: make {target} ONLY="{" ".join(failed)}"'
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
