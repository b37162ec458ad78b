"""What the figures of a run cost: processor time of all that is measured and written, as a share of a step's.

A Llama of random weights trains under ZeRO-3, and what measures, exchanges and writes figures is timed where it is
called, by the processor's clock: half a percent of a step is less than two steps differ by, so a run without figures
would tell nothing. Of what is too short to be timed the calls are counted, and multiplied by what one takes in a loop.
Figures are of rank 0, the one that writes. A step is a median too, of processor time, without its waits for others.

    python -m tools.bench.metrics --json
    python -m tools.bench.metrics --json --ranks 2 --tokens 256
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import wraps
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tools.bench.fits import Case
from tools.bench.ranks import Ranks
from tools.bench.timing import conditions, print_json

BAR = 0.005
"""Of a step: what all figures may take."""
CASE = Case(512, 1408, 8, 32000, tokens=512)
STEPS, FIRST = 40, 8
"""Steps of a measured run, and those of them that do not count: they allocate, compile and connect."""
OFTEN = {"train.log_interval": 2, "schedule.update_interval": 4, "pictures.interval": 8}
"""How often a measured run has figures."""
LOG_INTERVAL, UPDATE_INTERVAL, PICTURES = 10, 4, 20
"""By default: steps between reports, and between mask updates; pictures in a run."""
LOOPS = 20_000
PARTS = {
    "step": ("pace", "straggler", "memory", "heartbeat"),
    "report": ("report",),
    "mask update": ("line", "layers"),
    "picture": ("picture",),
}
"""What is timed by itself, by how often it is called. The clocks of a step's parts are counted beside it."""


@dataclass(slots=True)
class Meter:
    """Processor time of functions of the training thread, by name; what one calls inside another counts once."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    entered: int = 0
    _inside: bool = False

    def timed(self, name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``action``, which then notes what each call takes."""

        @wraps(action)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return action(*args, **kwargs)
            self._inside, began = True, time.thread_time()
            try:
                return action(*args, **kwargs)
            finally:
                self.seconds.setdefault(name, []).append(time.thread_time() - began)
                self._inside = False

        return run

    def counted(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``action``, whose calls are then counted."""

        @wraps(action)
        def run(*args: Any) -> Any:
            self.entered += 1
            return action(*args)

        return run


class Metered:
    """A run of ``case``, on this rank, whose model and run file are in ``folder``."""

    def __init__(self, case: Case, folder: str):
        from pst_ds.config.toml import load_run

        run_file, *words = case.arguments(Path(folder))
        settings = [word for word in words if word != "--set"] + [f"{key}={value}" for key, value in OFTEN.items()]
        self._run = load_run(run_file, [*settings, f"train.num_steps={STEPS}", "eval.interval=-1"])

    def train(self) -> dict[str, float]:
        """Return the processor seconds of a step, and of a call of each part. Collective."""
        from pst_ds.parallel.launch import launch_environment
        from pst_ds.train import loop
        from pst_ds.train.monitor.metrics import MetricsWriter
        from pst_ds.train.run import prepare, train_run
        from pst_ds.train.timing.step_clock import _HostPart
        from pst_ds.train.timing.stragglers import Pace

        meter, ends = Meter(), []
        report = meter.timed("report", loop._report_if_due)

        def end_of_step(*args: Any) -> None:
            ends.append((time.process_time(), meter.entered))
            report(*args)

        timed = [
            (loop, "_name_straggler", "straggler"), (loop, "peak_memory_bytes", "memory"), (Pace, "add", "pace"),
            (loop, "heartbeat", "heartbeat"), (MetricsWriter, "write", "line"), (MetricsWriter, "masks", "layers"),
            (loop, "_picture_if_due", "picture"),
        ]  # fmt: skip
        with ExitStack() as patched:
            for owner, name, part in timed:
                patched.enter_context(mock.patch.object(owner, name, meter.timed(part, getattr(owner, name))))
            patched.enter_context(mock.patch.object(loop, "_report_if_due", end_of_step))
            patched.enter_context(mock.patch.object(_HostPart, "__enter__", meter.counted(_HostPart.__enter__)))
            train_run(prepare(self._run, launch_environment()), quiet=True, restart=True)
        return figures(meter, ends) | clock_seconds()


def figures(meter: Meter, ends: list[tuple[float, int]]) -> dict[str, float]:
    """Return the medians of what was metered. ``ends``: of every step, with what was entered by then."""
    counted = ends[FIRST:]
    pairs = list(pairwise(counted))
    found = {name: _typical(name, seconds) for name, seconds in meter.seconds.items()}
    found["whole step"] = statistics.median(after[0] - before[0] for before, after in pairs)
    found["clocks"] = statistics.median(after[1] - before[1] for before, after in pairs)
    return found


def _typical(name: str, seconds: list[float]) -> float:
    """Return the median of the calls that did something: reports and pictures are asked for after every step."""
    most = max(seconds)
    return statistics.median(value for value in seconds if name not in ("report", "picture") or value > most / 10)


def clock_seconds() -> dict[str, float]:
    """Return the processor seconds of one wait that is timed, and of the clocks of a whole step beside its waits."""
    from pst_ds.train.timing.stragglers import OwnTime

    engine = SimpleNamespace(allreduce_gradients=lambda: None)
    own = OwnTime("cpu", engine)
    with own.working():
        began = time.thread_time()
        for _ in range(LOOPS):
            engine.allreduce_gradients()
        wait = (time.thread_time() - began) / LOOPS
    began = time.thread_time()
    for _ in range(LOOPS):
        with own.working(), own.exchanging():
            pass
    return {"clock": wait, "exchange": (time.thread_time() - began) / LOOPS}


def summary(stated: dict[str, Any], seconds: dict[str, float], num_steps: int) -> dict[str, Any]:
    """Return the report: what each part takes a call, and all parts of a step of a run of ``num_steps``."""
    each = {part: sum(seconds[name] for name in names) for part, names in PARTS.items()}
    each["step"] += seconds["clocks"] * seconds["clock"] + seconds["exchange"]
    calls = {
        "step": 1.0,
        "report": 1 / LOG_INTERVAL,
        "mask update": 1 / UPDATE_INTERVAL,
        "picture": PICTURES / num_steps,
    }
    shares = {part: each[part] * calls[part] / seconds["whole step"] for part in each}
    return {
        "benchmark": "metrics",
        "conditions": stated,
        "num_steps": num_steps,
        "seconds": seconds,
        "seconds_a_call": each,
        "shares": shares,
        "share": sum(shares.values()),
        "within_bar": sum(shares.values()) <= BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=CASE.tokens, help="of a rank's sequence")
    parser.add_argument("--layers", type=int, default=CASE.layers)
    parser.add_argument("--num-steps", type=int, default=1000, help="of the run that the shares are of")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    args = parser.parse_args()
    case = replace(CASE, ranks=args.ranks, tokens=args.tokens, layers=args.layers)
    with tempfile.TemporaryDirectory() as folder:
        case.write_inputs(Path(folder))
        with Ranks(case.ranks, Metered, case, folder) as team:
            seconds = team.call("train")[0]
    report = summary(conditions(case=asdict(case), zero_stage=3), seconds, args.num_steps)
    _print(report)
    if args.json:
        print_json(report)


def _print(report: dict[str, Any]) -> None:
    stated, step = report["conditions"], report["seconds"]["whole step"]
    print(f"{stated['hardware']}, {stated['case']}")
    print(f"a step takes {step * 1e3:.1f} ms of processor time, all figures {report['share']:.3%} of it")
    for part, seconds in report["seconds_a_call"].items():
        print(f"{part:>12}: {seconds * 1e3:8.3f} ms a call, {report['shares'][part]:.3%} of a step")


if __name__ == "__main__":
    main()
