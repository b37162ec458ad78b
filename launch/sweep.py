"""Submit a grid of runs with submitit, a job each, which go on by themselves after a time limit or a preemption.

    python launch/sweep.py runs/sweep run.toml --vary seed 1 2 3 --vary schedule.final_sparsity 0.5 0.9 \\
        --parameter nodes=2 --parameter tasks_per_node=8 --parameter gpus_per_node=8 --parameter slurm_partition=long

The run of seed 1 and sparsity 0.5 is in runs/sweep/seed-1,final_sparsity-0.5. Every task of a job is a rank. The same
command again goes on with runs that have not ended. With --cluster local they run here, one after another.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from pst_ds.config.toml import load_run
from pst_ds.errors import InputError
from pst_ds.file_names import RESULT_FILE

EXIT_STOPPED = 75
MOST_TIME_LIMITS = 1000
"""How often a job may come back."""
DEFAULTS = {"name": "pst-ds-sweep", "timeout_min": 1440, "slurm_signal_delay_s": 300, "slurm_array_parallelism": 1000}


@dataclass
class Run:
    """What a task of a job does: it is one rank of ``pst-ds train``."""

    arguments: list[str]
    rank: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        task = submitit.JobEnvironment()
        environment = dict(os.environ)
        if task.num_tasks > 1:
            address = os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
            environment |= {"MASTER_ADDR": address, "MASTER_PORT": str(10000 + int(task.raw_job_id) % 20000)}
            environment |= {"RANK": str(task.global_rank), "LOCAL_RANK": str(task.local_rank)}
            environment["WORLD_SIZE"] = str(task.num_tasks)
        # Slurm sends submitit's signal to all processes of a task; this one is to save at submitit's word
        ignoring = ["env", f"--ignore-signal={task.USR_SIG}"]
        words = [*ignoring, sys.executable, "-m", "pst_ds", "train", *self.arguments, "--resume"]
        self.rank = subprocess.Popen(words, env=environment)
        self._await()
        code = self.rank.wait()
        if code == EXIT_STOPPED:
            sys.exit(code)
        if code:
            raise RuntimeError(f"{' '.join(words)} ended with {code}; its own message is above")

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Save, before submitit queues the job again. Called on the first rank alone: the others stop with it."""
        if self.rank is not None:
            self.rank.terminate()
            self._await()
        return submitit.helpers.DelayedSubmission(Run(self.arguments))

    def _await(self) -> None:
        """Wait for the end of the rank, without locks: a signal may call this while it waits already."""
        assert self.rank is not None
        os.waitid(os.P_PID, self.rank.pid, os.WEXITED | os.WNOWAIT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the run folders")
    parser.add_argument("run", help="run file (TOML)")
    vary = "a setting and its values; several of them make a grid"
    parser.add_argument("--vary", action="append", nargs="+", required=True, metavar=("KEY", "VALUE"), help=vary)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm")
    parameter = "of submitit's AutoExecutor; numbers as they are"
    parser.add_argument("--parameter", action="append", default=[], metavar="NAME=VALUE", help=parameter)
    args = parser.parse_args()
    try:
        runs = list(grid(args))
        executor = submitit.AutoExecutor(
            args.folder / "submitit" / "%j", args.cluster, **{f"{args.cluster}_max_num_timeout": MOST_TIME_LIMITS}
        )
        executor.update_parameters(**{**DEFAULTS, **dict(map(_parameter, args.parameter))})
    except (InputError, NameError, AssertionError) as error:  # the latter two are submitit's
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    return run_here(executor, runs) if args.cluster == "local" else submit(executor, runs)


def grid(args: argparse.Namespace) -> Iterator[tuple[Path, Run]]:
    """Yield the runs of a grid that have not ended, with their folders. Raises InputError for what no run may have."""
    if short := [key for key, *values in args.vary if not values]:
        raise InputError(f"--vary {short[0]} has no values; give them after the name")
    folders = set()
    for chosen in itertools.product(*([(key, value) for value in values] for key, *values in args.vary)):
        folder = args.folder / ",".join(_name(key, value) for key, value in chosen)
        if folder in folders:
            raise InputError(f"--vary: two runs would be in {folder}; give values that differ in letters or digits")
        folders.add(folder)
        words = [*args.set, *(f"{key}={value}" for key, value in chosen), f"output_dir={json.dumps(str(folder))}"]
        load_run(Path(args.run), words)
        if not (folder / RESULT_FILE).exists():
            yield folder, Run([args.run, *(word for setting in words for word in ("--set", setting))])


def submit(executor: submitit.AutoExecutor, runs: list[tuple[Path, Run]]) -> int:
    """Submit all in one array."""
    with executor.batch():
        jobs = [executor.submit(run) for _, run in runs]
    for (folder, _), job in zip(runs, jobs, strict=True):
        print(f"{job.job_id}: {folder}")
    return 0


def run_here(executor: submitit.AutoExecutor, runs: list[tuple[Path, Run]]) -> int:
    """Run one after another; 1 if one of them fails."""
    failed = []
    for folder, run in runs:
        job = executor.submit(run)
        print(f"{job.job_id}: {folder}", flush=True)
        if job.exception() is not None:
            failed.append(folder)
            print(f"sweep.py: {folder} failed; see {job.paths.stderr}", file=sys.stderr)
    return 1 if failed else 0


def _name(key: str, value: str) -> str:
    """Return the part of a folder's name that says what varies: "final_sparsity-0.9"."""
    return re.sub(r"[^\w.+-]+", "-", f"{key.rpartition('.')[2]}-{value}")


def _parameter(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, int(value) if value.isdigit() else value


if __name__ == "__main__":
    sys.exit(main())
