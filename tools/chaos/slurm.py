"""Kill the ranks of a training under a real Slurm, cut off a host for good, and check that the run ends unattended.

A Slurm of three hosts runs on this machine, each in a network namespace. A small training runs once on two of them
without interruption. Then it is submitted with launch/slurm_unattended.sbatch and one spare host: ranks are killed with
SIGKILL at random moments after a new checkpoint, and at one such moment a host loses its network and the shared folder.
In the end everything must be bit-identical to the uninterrupted training, and the lost host must have been excluded.
Needs root and slurm-wlm.

    python -m tools.chaos.slurm --kills 10 --seed 0 --json

The seed determines the aims, not their exact timing. Exit codes: 0 passed, 1 failed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.chaos.compare import differences
from tools.chaos.kill_points import Watch, victims
from tools.cluster.processes import RUN_FILE, environment_of, kill_all, rank_processes, wait_until
from tools.cluster.slurm import Slurm, slurm_cluster

INTERVAL = 2
"""Steps between checkpoints."""
MOST_STEPS = 4
"""Maximum steps of a start between its first checkpoint and the kill."""
STEPS_A_START = 2 * INTERVAL + MOST_STEPS
SETTINGS = (
    "model.dropout=0.1",
    "eval.interval=10",
    f"checkpoint.interval={INTERVAL}",
    "checkpoint.keep_last=2",
    "train.log_interval=1",
    "train.stall_timeout_seconds=8",
)
RANKS = 2
PAUSE_SECONDS = 0.2
WAIT_SECONDS = 240.0
"""Seconds for a start to reach its moment, and for the job to end after the last one."""


@dataclass(frozen=True, slots=True)
class Event:
    """What was done to a start of the run."""

    what: str
    """The killed ranks, or the host."""
    step: int
    """Last step that this start had reported."""


@dataclass(slots=True)
class Findings:
    """Results of the test."""

    events: list[Event] = field(default_factory=list)
    lost: str = ""
    """The host that was cut off: that of the second rank, since the first host runs the job's script."""
    state: str = ""
    """State of the job at its end."""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    """Lines of ``pst-ds launch`` about its starts."""
    was_named: bool = False
    """Whether the job's log names the excluded host."""
    differences: list[str] = field(default_factory=list)

    @property
    def left_out(self) -> list[str]:
        found: list[str] = self.attempts[-1]["left_out"] if self.attempts else []
        return found

    @property
    def all_is_well(self) -> bool:
        ended = self.state == "COMPLETED" and len(self.attempts) == len(self.events) + 1
        return ended and self.left_out == [self.lost] != [""] and self.was_named and not self.differences


def disturbed(slurm: Slurm, out: Path, kills: int, seed: int) -> Findings:
    """Train in ``out`` twice, without and with kills and the loss of a host. Raises TimeoutError."""
    rng, findings = random.Random(seed), Findings()
    aims = ["kill"] * kills
    aims.insert(rng.randint(0, kills), "cut off")
    runs = out / "runs"
    runs.mkdir(parents=True)
    reference, folder = runs / "reference", runs / "disturbed"
    settings = [*SETTINGS, f"train.num_steps={STEPS_A_START * (len(aims) + 1)}"]
    words = [RUN_FILE, *(word for setting in settings for word in ("--set", setting))]

    log = out / "reference.log"
    script = ["--nodes=2", f"--output={log}", "launch/slurm.sbatch"]
    job = slurm.submit("--time=60", *script, *words, "--set", f"output_dir={reference}")
    slurm.wait(job, WAIT_SECONDS, log)
    log = out / "disturbed.log"
    script = [f"--output={log}", "launch/slurm_unattended.sbatch", "1"]
    retries = ["--retries", str(2 * len(aims)), "--wait", "1"]
    env = {**slurm.environment(), "PST_DS_SRUN_ARGS": "--wait=5"}
    job = slurm.submit("--time=60", *script, *words, *retries, "--set", f"output_dir={folder}", env=env)
    before: set[int] = set()
    for aim in aims:
        ranks, watch = _new_ranks(folder, before, log), Watch(folder)
        moment = _moment(watch, rng)
        wait_until(lambda: next(moment, "now") == "now", WAIT_SECONDS, lambda: f"{aim}, {log.read_text()}")  # noqa: B023
        chosen = victims(RANKS, rng)
        if aim == "kill":
            kill_all([ranks[rank] for rank in chosen])
        else:
            findings.lost = environment_of(ranks[1])["SLURMD_NODENAME"]
            slurm.cut_off(findings.lost, runs)
        what = f"rank {', '.join(map(str, chosen))} killed" if aim == "kill" else f"{findings.lost} cut off"
        findings.events.append(Event(what, watch.last_step()))
        print(f"{len(findings.events):>3} of {len(aims)}: {what}, step {watch.last_step()}", flush=True)
        before |= set(ranks.values())
    findings.state = slurm.wait(job, WAIT_SECONDS, log)["JobState"]
    lines = (folder / "launch" / "attempts.jsonl").read_text(encoding="utf-8").splitlines()
    findings.attempts = [json.loads(line) for line in lines]
    findings.was_named = f"without {findings.lost} from now on" in log.read_text(encoding="utf-8")
    findings.differences = differences(reference, folder)
    return findings


def _new_ranks(folder: Path, before: set[int], log: Path) -> dict[int, int]:
    """Return the processes by rank of the next start, once all are running."""

    def found() -> dict[int, int] | None:
        pids = [pid for pid in rank_processes(folder) if pid not in before]
        ranks = {int(environment_of(pid)["RANK"]): pid for pid in pids}
        return ranks if len(ranks) == RANKS else None

    ranks = wait_until(found, WAIT_SECONDS, lambda: f"ranks of a start:\n{log.read_text(encoding='utf-8')}")
    assert ranks is not None
    return ranks


def _moment(watch: Watch, rng: random.Random) -> Iterator[None]:
    """Yield until a random moment after this start's first checkpoint, in a step or a save."""
    while not watch.named_at:
        watch.look()
        yield
    target = watch.last_step() + rng.randint(0, MOST_STEPS)
    while watch.last_step() < target:
        yield
    end = time.monotonic() + rng.uniform(0, PAUSE_SECONDS)
    while time.monotonic() < end:
        yield


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tools.chaos.slurm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="kills in addition to the loss of a host")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="end with one JSON object on the last line of stdout")
    arguments = parser.parse_args()
    began, out = time.monotonic(), Path(tempfile.mkdtemp(prefix="pst-ds-chaos-"))
    (out / "slurm").mkdir()
    with slurm_cluster(out / "slurm", apart=True) as slurm:
        findings = disturbed(slurm, out, arguments.kills, arguments.seed)
    seconds = round(time.monotonic() - began)
    print(
        f"{findings.state} after {len(findings.attempts)} starts and {seconds} s, without {findings.left_out}; "
        f"{f'{len(findings.differences)} differences' if findings.differences else 'identical'}"
    )
    if findings.all_is_well:
        shutil.rmtree(out)
    else:
        print("\n".join([*findings.differences[:10], f"not as it must be; everything is in {out}"]))
    if arguments.json:
        more = {"left_out": findings.left_out, "well": findings.all_is_well, "seed": arguments.seed, "seconds": seconds}
        print(json.dumps({"chaos": "slurm", **asdict(findings), **more}))
    return 0 if findings.all_is_well else 1


if __name__ == "__main__":
    sys.exit(main())
