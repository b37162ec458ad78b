"""A Slurm of one controller and a few nodes on this machine, in one folder with its own munge. Nodes share this
machine's network, or are emulated hosts, of which one can be cut off.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tools.cluster.namespaces import INTERFACE, SWITCH, Network, network
from tools.cluster.processes import (
    Background,
    LackError,
    call,
    ended_after,
    environment,
    free_ports,
    kill_all,
    processes,
    require,
    wait_until,
)

UP_SECONDS = 60
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
"""States of a job that is over."""
NODES = ("n1", "n2")
TIMEOUTS = "MessageTimeout=3\nTCPTimeout=1\nSlurmdTimeout=40\nKillWait=3"
"""Timeouts for nodes that are cut off: shorter than the default, longer than the detection of stalled runs."""
CONTROLLER = "10.213.78.254"
ADDRESSES = {"n1": "10.213.78.1", "n2": "10.213.78.2", "n3": "10.213.78.3"}
"""Addresses of emulated hosts."""

# cred_expire is also how long a requeued job waits, two minutes by default; sched_interval how often the queue is
# looked through. Nodes are processes: nothing here may need a name to be resolved, a cgroup or another user. The first
# job's number differs from process to process, since launch/slurm.sbatch makes a port of it.
CONFIG = """
ClusterName=pst-ds
FirstJobId={first_job}
SlurmctldHost={host}({controller})
SlurmctldPort={port}
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
{timeouts}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster."""

    folder: Path
    network: Network | None = None
    """Network of emulated hosts."""
    daemons: dict[str, Background] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        apart = {"GLOO_SOCKET_IFNAME": INTERFACE} if self.network else {}  # names of nodes do not resolve
        return environment(SLURM_CONF=str(self.folder / "slurm.conf"), **apart)

    def on(self, node: str, *command: str) -> list[str]:
        """Return the command that runs ``command`` on a node, or on the controller's host."""
        return self.network.on(node, *command) if self.network else list(command)

    def call(self, *command: str, env: dict[str, str] | None = None) -> str:
        return call(*self.on(SWITCH, *command), env=env or self.environment())

    def submit(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        """Submit ``sbatch ARGUMENTS``. Return the job's number."""
        return self.call("sbatch", "--parsable", *arguments, env=env).partition(";")[0]

    def cut_off(self, node: str, shared: Path) -> None:
        """Cut an emulated host off from the network and from the shared folder, for good."""
        assert self.network is not None
        self.network.cut_off(node)
        mounts = ("nsenter", "--mount", "--target", str(self.daemons[f"slurmd-{node}"].process.pid))
        call(*mounts, "mount", "-t", "tmpfs", "none", str(shared))

    def shown(self, job: str) -> dict[str, str]:
        """Return the fields of ``scontrol show job``, such as JobState, Restarts and ExitCode."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, seconds: float, log: Path) -> dict[str, str]:
        """Wait until the job has ended. Return its fields. Raises TimeoutError with its log."""

        def shown_at_end() -> dict[str, str] | None:
            shown = self.shown(job)
            return shown if shown["JobState"] in ENDED else None

        shown = wait_until(shown_at_end, seconds, lambda: f"an end of job {job}, {self.shown(job)}:\n{_tail(log)}")
        assert shown is not None
        return shown


@contextmanager
def slurm_cluster(folder: Path, *, apart: bool = False) -> Iterator[Slurm]:
    """Start a cluster in an empty folder, and end its daemons, jobs and their processes afterwards.

    It has two nodes on this machine's network, or, if ``apart``, three emulated hosts. Raises LackError.
    """
    require("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
    if apart:
        require("ip", "nsenter", "unshare")
    with ExitStack() as stack:
        laid = stack.enter_context(network(ADDRESSES, CONTROLLER)) if apart else None
        slurm = Slurm(folder, laid)
        nodes = ADDRESSES if apart else dict.fromkeys(NODES, "127.0.0.1")
        _write_files(folder, nodes, apart)
        stack.callback(_kill_what_is_left, slurm)
        daemons = {
            "munged": ["munged", "--foreground", "--force", *_munge_files(folder)],
            "slurmctld": slurm.on(SWITCH, "slurmctld", "-D", "-i"),
            **{f"slurmd-{node}": _slurmd(slurm, node) for node in nodes},
        }
        for name, command in daemons.items():
            daemon = Background(folder / f"{name}.out", *command, env=slurm.environment())
            slurm.daemons[name] = stack.enter_context(ended_after(daemon))
            if name == "munged":
                wait_until((folder / "munge.socket").exists, UP_SECONDS, lambda: _tail(folder / "munged.out"))
        _wait_for_nodes(slurm, len(nodes))
        yield slurm


def _slurmd(slurm: Slurm, node: str) -> list[str]:
    if slurm.network is None:
        return ["slurmd", "-D", "-N", node]
    named = f"hostname {node} && exec slurmd -D -N {node}"
    return slurm.on(node, "unshare", "--uts", "sh", "-c", named)


def _write_files(folder: Path, nodes: Mapping[str, str], apart: bool) -> None:
    host = socket.gethostname().partition(".")[0]
    (folder / "state").mkdir()
    for node in nodes:
        (folder / f"spool-{node}").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n", encoding="utf-8")
    port, *ports = free_ports(1 + len(nodes))
    lines = [
        f"NodeName={node} NodeHostname={node if apart else host} NodeAddr={address} Port={port_of_node}"
        for (node, address), port_of_node in zip(nodes.items(), ports, strict=True)
    ]
    config = CONFIG.format(
        host=host,
        folder=folder,
        controller=CONTROLLER if apart else "127.0.0.1",
        port=port,
        nodes="\n".join(lines),
        first_job=50 * (1 + os.getpid() % 380),
        timeouts=TIMEOUTS if apart else "",
    )
    (folder / "slurm.conf").write_text(config, encoding="utf-8")


def _munge_files(folder: Path) -> list[str]:
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
    files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    return [f"--{option}={folder / name}" for option, name in files.items()]


def _wait_for_nodes(slurm: Slurm, count: int) -> None:
    def idle() -> bool:
        command = slurm.on(SWITCH, "sinfo", "--noheader", "--Node", "--format=%T")
        done = subprocess.run(command, env=slurm.environment(), capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.split() == ["idle"] * count

    logs = [slurm.folder / f"{name}.out" for name in slurm.daemons if name != "munged"]
    try:
        wait_until(idle, UP_SECONDS, lambda: "idle nodes:\n" + "\n".join(map(_tail, logs)))
    except TimeoutError as error:
        raise LackError(f"Slurm does not come up here: {error}") from None


def _kill_what_is_left(slurm: Slurm) -> None:
    """Kill steps and tasks, which outlive the daemons; all have the path of the configuration in their environment."""
    mark = f"SLURM_CONF={slurm.folder}/slurm.conf".encode()
    kill_all(processes(lambda entry: mark in (entry / "environ").read_bytes().split(b"\0")))


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-4000:] if log.is_file() else f"{log.name} is not there"
