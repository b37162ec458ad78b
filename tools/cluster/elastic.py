"""Hosts in network namespaces that train one run through launch/elastic.sh, and may leave and join."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tools.cluster.namespaces import INTERFACE, Network, network
from tools.cluster.processes import Background, environment, environment_of, kill_all, rank_processes, require

PORT = 29400


@dataclass
class ElasticHosts:
    """Hosts that meet at the first one, each with a log in ``folder``."""

    network: Network
    addresses: Mapping[str, str]
    folder: Path
    agents: dict[str, Background] = field(default_factory=dict)
    """The last launch/elastic.sh of each host."""

    @property
    def first(self) -> str:
        return next(iter(self.addresses))

    def start(self, host: str, words: Sequence[str], *, fewest: int = 1, most: int = 0, ranks: int = 1) -> Background:
        """Let a host join the run that ``words`` name."""
        own = {
            "PET_LOCAL_ADDR": self.addresses[host],  # names of these hosts do not resolve
            "PET_RDZV_CONF": f"last_call_timeout=15,is_host={int(host == self.first)}",
            "GLOO_SOCKET_IFNAME": INTERFACE,
        }
        command = ["launch/elastic.sh", "--hosts", f"{fewest}:{most or len(self.addresses)}", "--ranks", str(ranks)]
        command += ["--meet", f"{self.addresses[self.first]}:{PORT}", *words]
        log = self.folder / f"{host}.log"
        self.agents[host] = Background(log, *self.network.on(host, *command), env=environment(**own))
        return self.agents[host]

    def ranks(self, folder: Path) -> dict[int, int]:
        """Return the processes that train into ``folder`` by rank."""
        found = {}
        for pid in rank_processes(folder):
            with suppress(OSError, KeyError):  # it has ended
                found[int(environment_of(pid)["RANK"])] = pid
        return found

    def is_running(self, host: str) -> bool:
        return host in self.agents and self.agents[host].process.poll() is None

    def kill(self, host: str) -> None:
        """Kill everything on a host at once, as when it loses power; its link stays, so others see resets."""
        kill_all(self.network.processes(host))
        if host in self.agents:
            self.agents[host].process.wait()

    def text(self) -> str:
        return "\n".join(f"=== {host}\n{agent.text()}" for host, agent in self.agents.items())


@contextmanager
def elastic_hosts(folder: Path, addresses: Mapping[str, str]) -> Iterator[ElasticHosts]:
    """Bring the hosts up, and end all their processes and remove them afterwards. Raises LackError."""
    require("ip")
    with network(addresses) as laid:
        hosts = ElasticHosts(laid, addresses, folder)
        try:
            yield hosts
        finally:
            for host, agent in hosts.agents.items():
                if agent.process.poll() is None:
                    agent.process.send_signal(signal.SIGKILL)
                hosts.kill(host)
