"""Let hosts fail, leave and join at random under launch/elastic.sh, and compare each run with an undisturbed one.

Hosts are network namespaces of this machine with one rank each, on gloo, with default settings. The first host has the
rendezvous and stays; the others lose a rank, lose power or are cut off, and join again later. Every run must end. Then
its steps are replayed without faults: torchrun trains each stretch of steps on as many ranks as the run had there, and
results, losses, masks, all tensors of the last checkpoint and the export must be equal bit for bit.

    python -m tools.chaos.elastic --faults 30 --json

Needs root and iproute2. Exit codes: 0 every run ended and equals its replay, 1 not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.chaos.compare import differences
from tools.cluster.elastic import ElasticHosts, elastic_hosts
from tools.cluster.processes import ROOT, RUN_FILE, Background, environment, result, steps, wait_until

SETTINGS = (
    "deepspeed_config=ds_configs/zero3_cpu.json", "model.dropout=0.1", "eval.interval=50", "checkpoint.interval=5",
    "train.log_interval=1",
)  # fmt: skip
KINDS = ("rank", "rank", "rank", "power", "power", "cut")
"""Faults in their proportion. A host that is cut off takes more than a minute to be noticed, so there are fewer."""
START_SHARE = 0.25
"""Share of faults that do not wait for a step, and so hit a start or a rendezvous."""
MOST_STEPS = 40
"""Most steps between the last fault, or a start, and the next fault."""
END_SECONDS = 900.0
"""Longest wait for a step, or for the end of a run."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done, and how long the run needed to train again."""

    kind: str
    host: str
    step: int
    """Last step before the fault."""
    seconds_to_end: float
    """Until all ranks of before had ended."""
    seconds_to_next_step: float


@dataclass(slots=True)
class Findings:
    """Results of all runs."""

    faults: list[Fault] = field(default_factory=list)
    runs: int = 0
    stretches: list[list[tuple[int, int]]] = field(default_factory=list)
    """(ranks, steps) of each run, one after another."""
    problems: list[str] = field(default_factory=list)


class Soak:
    """Runs in ``out`` on ``hosts`` that are disturbed until ``faults`` are used up."""

    def __init__(self, hosts: ElasticHosts, arguments: argparse.Namespace, out: Path, findings: Findings):
        self._hosts = hosts
        self._names = list(hosts.addresses)
        self._arguments = arguments
        self._out = out
        self._findings = findings
        self._rng = random.Random(arguments.seed)
        self._absent: dict[str, int] = {}
        """Hosts that are away, with the step at which they join again."""
        self._cut: set[str] = set()

    def run(self) -> None:
        """Disturb runs, and compare each of them with its replay. Raises TimeoutError if one does not end."""
        while len(self._findings.faults) < self._arguments.faults:
            folder = self._out / f"run-{self._findings.runs + 1}"
            self._disturbed(folder)
            self._findings.runs += 1
            stretches = ranks_of_steps(folder)
            self._findings.stretches.append(stretches)
            replayed = self._out / f"replay-{self._findings.runs}"
            replay(replayed, self._words(replayed), stretches)
            unequal = differences(folder, replayed)
            self._findings.problems += [f"{folder.name}: {difference}" for difference in unequal[:10]]
            print(f"{folder.name}: {len(unequal)} differences in {len(stretches)} stretches {stretches}", flush=True)

    def _words(self, folder: Path) -> list[str]:
        settings = [*SETTINGS, f"train.num_steps={self._arguments.steps}", f"output_dir={folder}"]
        return [RUN_FILE, *(word for setting in settings for word in ("--set", setting))]

    def _disturbed(self, folder: Path) -> None:
        """Train one run to its end, with faults as long as there are some left."""
        for host in self._names:
            self._start(host, folder)
        agent = self._hosts.agents[self._names[0]]
        while len(self._findings.faults) < self._arguments.faults and not self._has_ended():
            if self._rng.random() > START_SHARE:
                self._wait_for_step(folder, self._last_step(folder) + self._rng.randint(1, MOST_STEPS))
            else:
                time.sleep(self._rng.uniform(0.0, 10.0))
            self._return_hosts(folder)
            if not self._has_ended():
                self._fault(folder)
        self._return_hosts(folder, everyone=True)
        code = agent.exit_code(END_SECONDS)
        if code != 0:
            raise TimeoutError(f"{folder.name} ended with {code}: {self._hosts.text()[-3000:]}")
        for host in self._names:
            self._hosts.kill(host)

    def _fault(self, folder: Path) -> None:
        kind = self._rng.choice(KINDS)
        present = [host for host in self._names[1:] if host not in self._absent]
        if not present:
            kind = "rank"
        host = self._names[0]
        before = self._last_step(folder)
        old = set(self._hosts.ranks(folder).values())
        began = time.monotonic()
        if kind == "rank":
            if not old:  # they are not there yet, or no longer
                return
            os.kill(self._rng.choice(sorted(old)), signal.SIGKILL)
        else:
            host = self._rng.choice(present)
            self._absent[host] = before + self._rng.randint(1, 2 * MOST_STEPS)
            if kind == "power":
                self._hosts.kill(host)
            else:
                self._hosts.network.cut_off(host)
                self._cut.add(host)
        noticed = self._seconds_until(lambda: not old & set(self._hosts.ranks(folder).values()), began, folder)
        # the same step may be trained again: look for a line that was written since
        again = self._seconds_until(lambda: _age(folder) < time.monotonic() - began - noticed, began, folder)
        fault = Fault(kind, host, before, seconds_to_end=noticed, seconds_to_next_step=again)
        self._findings.faults.append(fault)
        print(f"fault {len(self._findings.faults):>3}/{self._arguments.faults} {fault}", flush=True)

    def _seconds_until(self, condition: Callable[[], bool], began: float, folder: Path) -> float:
        self._wait(lambda: self._has_ended() or condition(), folder)
        return round(time.monotonic() - began, 1)

    def _return_hosts(self, folder: Path, *, everyone: bool = False) -> None:
        """Start the hosts whose time has come, as after a repair: nothing of before runs there."""
        for host, step in list(self._absent.items()):
            if self._last_step(folder) < step and not everyone:
                continue
            if host in self._cut:
                self._hosts.network.connect(host)
                self._cut.remove(host)
            self._hosts.kill(host)
            del self._absent[host]
            if not self._has_ended():
                self._start(host, folder)

    def _start(self, host: str, folder: Path) -> None:
        self._hosts.start(host, self._words(folder))

    def _has_ended(self) -> bool:
        return not self._hosts.is_running(self._names[0])

    def _last_step(self, folder: Path) -> int:
        return max(steps(folder), default=0)

    def _wait_for_step(self, folder: Path, step: int) -> None:
        self._wait(lambda: self._has_ended() or self._last_step(folder) >= step, folder)

    def _wait(self, condition: Callable[[], bool], folder: Path) -> None:
        wait_until(condition, END_SECONDS, lambda: f"progress of {folder.name}: {self._hosts.text()[-3000:]}")


def _age(folder: Path) -> float:
    """Return the seconds since the metrics of a run were written."""
    try:
        return time.time() - (folder / "metrics.jsonl").stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def ranks_of_steps(folder: Path) -> list[tuple[int, int]]:
    """Return (ranks, steps) of the stretches of a run whose steps had as many ranks."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ranks = [line["ranks"] for line in lines if line["event"] == "step"]
    return [(count, len(list(group))) for count, group in itertools.groupby(ranks)]


def replay(folder: Path, words: Sequence[str], stretches: Sequence[tuple[int, int]]) -> None:
    """Train a run on the ranks of each stretch, without faults. Raises RuntimeError if a stretch does not end so."""
    for number, (ranks, count) in enumerate(stretches, start=1):
        is_last = number == len(stretches)
        command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--local-addr", "127.0.0.1"]
        # torchrun would start the ranks again after exit code 75
        command += ["--max-restarts", "0", "--nproc-per-node", str(ranks), "-m", "tools.chaos.replay"]
        most = 0 if is_last else count
        log = folder.with_name(f"{folder.name}.log")
        stretch = Background(log, *command, str(most), *words, "--resume", env=environment())
        stretch.exit_code(END_SECONDS)
        done = max(steps(folder), default=0)
        if done != sum(stretch_steps for _, stretch_steps in stretches[:number]):
            raise RuntimeError(f"the replay of stretch {number} ended after step {done}: {stretch.text()[-3000:]}")
    result(folder)


def summary(findings: Findings, arguments: argparse.Namespace, seconds: float) -> dict[str, object]:
    """Return the JSON object."""
    slowest: dict[str, float] = {}
    noticed: dict[str, float] = {}
    for fault in findings.faults:
        slowest[fault.kind] = max(slowest.get(fault.kind, 0.0), fault.seconds_to_next_step)
        noticed[fault.kind] = max(noticed.get(fault.kind, 0.0), fault.seconds_to_end)
    return {
        "faults": Counter(fault.kind for fault in findings.faults),
        "most_seconds_to_end": noticed,
        "most_seconds_to_next_step": slowest,
        "runs": findings.runs,
        "stretches": findings.stretches,
        "identical": not findings.problems,
        "problems": findings.problems,
        "hosts": arguments.hosts,
        "seed": arguments.seed,
        "seconds": round(seconds, 1),
        "each": [asdict(fault) for fault in findings.faults],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tools.chaos.elastic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--hosts", type=int, default=2, choices=(2, 3), help="each with one rank")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line of stdout")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no rank is left behind
    began = time.monotonic()
    findings = Findings()
    out = Path(tempfile.mkdtemp(prefix="pst-ds-elastic-"))
    addresses = {f"host-{number}": f"10.213.79.{number}" for number in range(1, arguments.hosts + 1)}
    os.environ["PET_MAX_RESTARTS"] = "1000"
    try:
        with elastic_hosts(out, addresses) as hosts:
            Soak(hosts, arguments, out, findings).run()
    except (TimeoutError, RuntimeError) as error:
        findings.problems.append(str(error))
    for problem in findings.problems:
        print(f"PROBLEM: {problem}")
    if findings.problems:
        print(f"failed; everything is in {out}")
    else:
        shutil.rmtree(out)
    if arguments.json:
        print(json.dumps(summary(findings, arguments, time.monotonic() - began)))
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main())
