"""A Slurm of one controller and two nodes on this machine, all in one folder, with a munge of its own."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .tools import (
    Background,
    call,
    ended_after,
    environment,
    free_ports,
    kill_all,
    lack,
    processes,
    require,
    wait_until,
)

UP_SECONDS = 60
NODES = ("n1", "n2")

# cred_expire is also how long a requeued job waits, two minutes by default; sched_interval how often the queue is
# looked through. Nodes are processes: nothing here may need a name to be resolved, a cgroup or another user.
CONFIG = """
ClusterName=pst-ds
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
SchedulerParameters=sched_interval=2,bf_interval=2
PropagateResourceLimits=CORE
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster that is up."""

    folder: Path

    def environment(self) -> dict[str, str]:
        return environment(SLURM_CONF=str(self.folder / "slurm.conf"))

    def call(self, *command: str) -> str:
        return call(*command, env=self.environment())

    def submit(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        """The number of the job that ``sbatch ARGUMENTS`` makes."""
        return call("sbatch", "--parsable", *arguments, env=env or self.environment()).partition(";")[0]

    def shown(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of it, such as JobState, Restarts and ExitCode."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, seconds: float, log: Path) -> dict[str, str]:
        """Waits until the job has left the queue for good; fails with its log. What is shown of it then."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def shown_at_end() -> dict[str, str] | None:
            shown = self.shown(job)
            return shown if shown["JobState"] in ended else None

        shown = wait_until(shown_at_end, seconds, lambda: f"an end of job {job}, {self.shown(job)}:\n{_tail(log)}")
        assert shown is not None
        return shown


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """Brings it up, and ends its daemons, jobs and their processes."""
    require("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
    slurm = Slurm(folder)
    host = socket.gethostname().partition(".")[0]
    (folder / "state").mkdir()
    for node in NODES:
        (folder / f"spool-{node}").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n", encoding="utf-8")
    config = CONFIG.format(host=host, folder=folder, ports=free_ports(3))
    (folder / "slurm.conf").write_text(config, encoding="utf-8")
    with ExitStack() as stack:
        stack.callback(_kill_what_is_left, slurm)
        daemons = {
            "munged": ["--foreground", "--force", *_munge_files(folder)],
            "slurmctld": ["-D", "-i"],
            **{f"slurmd-{node}": ["-D", "-N", node] for node in NODES},
        }
        for name, arguments in daemons.items():
            command = [name.partition("-")[0], *arguments]
            stack.enter_context(ended_after(Background(folder / f"{name}.out", *command, env=slurm.environment())))
            if name == "munged":
                wait_until((folder / "munge.socket").exists, UP_SECONDS, lambda: _tail(folder / "munged.out"))
        _wait_for_nodes(slurm)
        yield slurm


def _munge_files(folder: Path) -> list[str]:
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
    files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    return [f"--{option}={folder / name}" for option, name in files.items()]


def _wait_for_nodes(slurm: Slurm) -> None:
    def idle() -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            env=slurm.environment(), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout.split() == ["idle"] * len(NODES)

    logs = [slurm.folder / "slurmctld.out", *(slurm.folder / f"slurmd-{node}.out" for node in NODES)]
    try:
        wait_until(idle, UP_SECONDS, lambda: "idle nodes:\n" + "\n".join(map(_tail, logs)))
    except BaseException as error:
        lack(f"Slurm does not come up here: {error}")


def _kill_what_is_left(slurm: Slurm) -> None:
    """Steps and tasks outlive the daemons. All have the place of the configuration in their environment."""
    mark = f"SLURM_CONF={slurm.folder}/slurm.conf".encode()
    kill_all(processes(lambda entry: mark in (entry / "environ").read_bytes().split(b"\0")))


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-4000:] if log.is_file() else f"{log.name} is not there"
