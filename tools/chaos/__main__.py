"""Kill the ranks of a training repeatedly, and check that the result is bit-identical to an undisturbed one.

A small training runs once without interruption. Then it is started again with the deepspeed launcher, and one, several
or all of its ranks are killed with SIGKILL at random moments: during start, a step, the writing or renaming of a
checkpoint, or the last save. Each time it resumes. A training that finishes before all kills are used is compared, and
another one is started. In the end masks, all tensors of the last checkpoint, exported weights and losses must be
bit-identical to the uninterrupted run, and no checkpoint may be lost.

    python -m tools.chaos --kills 20 --json
    python -m tools.chaos --run my_run.toml --set train.num_steps=200 --ranks 4 --out chaos

Paths in a run file are relative to the repository's root. The seed determines the aims, not their exact timing. Exit
codes: 0 identical and every kill resumed, 1 not, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.chaos.compare import differences, false_failures, set_aside, whole_checkpoints
from tools.chaos.kill_points import HALF, WHERE, Timing, Watch, deck, moment, victims
from tools.chaos.launch import ROOT, Launch

RUN_FILE = "tests/data/world_size.toml"
SETTINGS = (
    "deepspeed_config=ds_configs/zero3_cpu.json", "model.dropout=0.1", "train.num_steps=60", "eval.interval=10",
    "checkpoint.interval=3", "checkpoint.keep_last=2",
)  # fmt: skip
"""Settings of the default run: a save in every third step, and evaluations that select a best checkpoint."""
LOOK_SECONDS = 0.001
MOST_MISSES = 5
"""Consecutive trainings that may end before the kill that was aimed at them."""
_WENT_ON = re.compile(r"resuming from .*, after step (\d+)$|nothing was saved in .*: starting at step (0)$", re.M)


class ChaosError(Exception):
    """The run violated a guarantee, or could not be hit."""


class RefusedError(Exception):
    """The training rejected its input."""


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill and the state after it."""

    where: str
    ranks: list[int]
    step: int
    """Last step that this start reported; 0 before training."""
    resumes_from: int
    lost_steps: int
    left_partial: bool
    """Whether a checkpoint was left partially written or removed."""
    forced: int
    """Ranks that did not end by themselves within the grace period."""


@dataclass(slots=True)
class Findings:
    """Results of all trainings."""

    kills: list[Kill] = field(default_factory=list)
    resumed: int = 0
    starts: int = 0
    runs: int = 0
    broken: set[str] = field(default_factory=set)
    false_failures: int = 0
    """Complete checkpoints that a run reports as failed. They are counted, but do not fail the test."""
    identical: bool = True
    problems: list[str] = field(default_factory=list)

    @property
    def all_is_well(self) -> bool:
        return self.identical and self.resumed == len(self.kills) and not (self.broken or self.problems)


class Soak:
    """Trainings of one run file in ``out`` that are killed."""

    def __init__(self, arguments: argparse.Namespace, out: Path, findings: Findings):
        self._arguments, self._out, self._findings = arguments, out, findings
        self._rng = random.Random(arguments.seed)
        own = arguments.run is not None
        self._run_file = str(Path(arguments.run).absolute()) if own else RUN_FILE
        settings = [*(() if own else SETTINGS), *arguments.set, "train.log_interval=1"]
        self._options = [option for setting in settings for option in ("--set", setting)]
        self._newest = 0  # step of the newest whole checkpoint of the training that is being killed
        self._pending = 0  # kills from which no start has resumed yet

    def run(self) -> None:
        """Run all trainings. Raises ChaosError, RefusedError."""
        reference = self._out / "reference"
        timing = self._uninterrupted(reference)
        print(
            f"uninterrupted: {timing.num_steps} steps in {timing.whole:.0f} s, {timing.start:.0f} s of it to start, "
            f"{timing.save * 1e3:.0f} ms to write a checkpoint",
            flush=True,
        )
        where, kills, misses = self._arguments.where, self._arguments.kills, 0
        aims = [where] * kills if where else deck(kills, self._rng)
        folder = self._begin()
        while True:
            kill = self._start(folder, timing, aims[0] if aims else None)
            if kill is not None:
                aims.pop(0)
                misses = 0
                self._note(kill)
                continue
            self._compare(reference, folder)
            if not aims:
                return
            misses += 1
            if misses > MOST_MISSES:
                raise ChaosError(
                    f"{misses} trainings ended before they could be hit at {aims[0]!r}; let them be longer"
                )
            folder = self._begin()

    def _begin(self) -> Path:
        self._newest = 0
        return self._out / f"killed-{self._findings.runs + 1}"

    def _uninterrupted(self, folder: Path) -> Timing:
        watch = Watch(folder)
        launch = self._launch(folder, "reference", [])
        try:
            self._look(launch, watch)
            ended = time.monotonic()
            code, _ = launch.end(self._arguments.grace)
        finally:
            launch.close()
        if code:
            raise (RefusedError if code == 2 else ChaosError)(f"the uninterrupted run ended with {_said(launch, code)}")
        num_steps = json.loads((folder / "result.json").read_text(encoding="utf-8"))["steps"]
        return watch.timing(ended, num_steps)

    def _start(self, folder: Path, timing: Timing, where: str | None) -> Kill | None:
        """Start or resume the training in ``folder`` and kill it as ``where`` says. Return None if it ended first."""
        self._findings.starts += 1
        watch, hit = Watch(folder), []
        launch = self._launch(folder, f"start-{self._findings.starts:03d}", ["--resume"])
        try:
            if self._look(launch, watch, moment(where, watch, timing, self._rng) if where else None):
                chosen = victims(self._arguments.ranks, self._rng)
                hit = chosen if launch.kill(chosen) else []
            code, forced = launch.end(self._arguments.grace)
        finally:
            launch.close()
        self._check_resume(launch)
        self._findings.broken.update(set_aside(folder))
        if not hit or code == 0:  # too late: the ranks had finished
            if code:
                raise ChaosError(f"a start in {folder} that nobody killed ended with {_said(launch, code)}")
            return None
        assert where is not None
        return self._killed(folder, watch, where, hit, forced)

    def _launch(self, folder: Path, name: str, more: list[str]) -> Launch:
        options = [*self._options, "--set", f"output_dir={json.dumps(str(folder))}"]
        return Launch([self._run_file, *more, *options], self._arguments.ranks, self._out / f"{name}.log")

    @staticmethod
    def _look(launch: Launch, watch: Watch, until: Iterator[None] | None = None) -> bool:
        """Watch a run until it ends or ``until``, started once all ranks run, does. Return whether ``until`` ended."""
        while launch.is_running():
            watch.look()
            if launch.pids():
                watch.ranks_seen()
                if until is not None and next(until, "now") == "now":
                    return True
            time.sleep(LOOK_SECONDS)
        return False

    def _check_resume(self, launch: Launch) -> None:
        """Check that this start resumed from the newest checkpoint, unless it was killed earlier."""
        match = _WENT_ON.search(launch.said())
        if match is None:
            return
        step = int(match[1] or match[2])
        if step != self._newest:
            self._findings.problems.append(f"{launch.log.name}: went on from step {step}, {self._newest} was there")
        self._findings.resumed += self._pending
        self._pending = 0

    def _killed(self, folder: Path, watch: Watch, where: str, hit: list[int], forced: int) -> Kill:
        """Return the state after a kill; record damaged and lost checkpoints."""
        step = watch.last_step()
        left_partial = watch.has_partial()
        whole, problems = whole_checkpoints(folder)
        self._findings.problems += problems
        newest = max(whole, default=0)
        if newest < max(self._newest, watch.newest):
            self._findings.problems.append(f"{folder}: checkpoint of step {max(self._newest, watch.newest)} was lost")
        self._newest = newest
        self._pending += 1
        return Kill(where, hit, step, newest, max(0, step - newest), left_partial, forced)

    def _note(self, kill: Kill) -> None:
        self._findings.kills.append(kill)
        ranks = ", ".join(map(str, kill.ranks))
        more = "; left a .partial" if kill.left_partial else ""
        more += f"; {kill.forced} other ranks had to be killed" if kill.forced else ""
        print(
            f"kill {len(self._findings.kills):>3}/{self._arguments.kills} {kill.where:<6} rank {ranks:<8} step "
            f"{kill.step:>4}, resumes from {kill.resumes_from:>4}, lost {kill.lost_steps}{more}",
            flush=True,
        )

    def _compare(self, reference: Path, folder: Path) -> None:
        self._findings.runs += 1
        found = differences(reference, folder)
        self._findings.false_failures += len(false_failures(folder))
        if found:
            self._findings.identical = False
            self._findings.problems += [f"{folder}: {difference}" for difference in found[:10]]
        print(f"{folder.name} ended: {'identical' if not found else f'{len(found)} differences'}", flush=True)


def _said(launch: Launch, code: int) -> str:
    lines = [line for line in launch.said().splitlines() if line.strip() and "[INFO]" not in line]
    return f"exit code {code}: " + " | ".join(lines[-3:])


def summary(findings: Findings, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return the JSON object."""
    kills = findings.kills
    counts = Counter(kill.where for kill in kills)
    return {
        "kills": len(kills),
        "where": {where: counts[where] for where in dict.fromkeys([*WHERE, *counts])},
        "resumed": findings.resumed,
        "broken_checkpoints": len(findings.broken),
        "false_failures": findings.false_failures,
        "lost_steps": [kill.lost_steps for kill in kills],
        "lost_steps_max": max((kill.lost_steps for kill in kills), default=0),
        "left_partial": sum(kill.left_partial for kill in kills),
        "forced_ranks": sum(kill.forced for kill in kills),
        "ranks_killed": [len(kill.ranks) for kill in kills],
        "starts": findings.starts,
        "runs": findings.runs,
        "identical": findings.identical and findings.runs > 0,
        "problems": findings.problems,
        "seconds": round(seconds, 1),
        "ranks": arguments.ranks,
        "seed": arguments.seed,
    }


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no rank is left behind
    began, findings = time.monotonic(), Findings()
    out = Path(arguments.out).absolute() if arguments.out else Path(tempfile.mkdtemp(prefix="pst-ds-chaos-"))
    out.mkdir(parents=True, exist_ok=True)
    try:
        Soak(arguments, out, findings).run()
    except RefusedError as error:
        print(f"chaos: {error}", file=sys.stderr)
        if not arguments.out:
            shutil.rmtree(out)
        return 2
    except ChaosError as error:
        findings.identical = False
        findings.problems.append(str(error))
    for problem in findings.problems:
        print(f"PROBLEM: {problem}")
    if not findings.all_is_well:
        print(f"failed; everything is in {out}")
    elif not arguments.out:
        shutil.rmtree(out)
    if arguments.json:
        print(json.dumps(summary(findings, arguments, time.monotonic() - began)))
    return 0 if findings.all_is_well else 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the arguments."""
    parser = argparse.ArgumentParser(
        "python -m tools.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", help=f"run file (default: {RUN_FILE} with {' '.join(SETTINGS)})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--where", choices=(*WHERE, HALF), help="aim of every kill (default: all in turn)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--grace", type=float, default=45.0, help="seconds that other ranks may take to end after a kill"
    )
    parser.add_argument(
        "--out", help="a new folder, which stays (default: temporary, and stays when something is wrong)"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line of stdout")
    arguments = parser.parse_args(argv)
    for name in ("ranks", "kills"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    run = ROOT / RUN_FILE if arguments.run is None else Path(arguments.run)
    if not run.is_file():
        parser.error(f"--run {run}: no such file")
    out = Path(arguments.out) if arguments.out else None
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"--out {out} is not an empty folder; name a new one")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
