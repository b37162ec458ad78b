"""Hosts emulated on this machine: network namespaces with addresses on one switch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tools.cluster.processes import LackError, call, environment, kill_all

INTERFACE = "eth0"
SWITCH = "switch"
"""Namespace to which all virtual cables lead."""


@dataclass(frozen=True)
class Network:
    """Namespaces by host. Host names are not resolved."""

    namespaces: Mapping[str, str]

    def on(self, host: str, *command: str) -> list[str]:
        """Return the command that runs ``command`` on ``host``."""
        return ["ip", "netns", "exec", self.namespaces[host], *command]

    def processes(self, host: str) -> list[int]:
        return [int(pid) for pid in call("ip", "netns", "pids", self.namespaces[host]).split()]

    def cut_off(self, host: str) -> None:
        """Disconnect a host."""
        call("ip", "-n", self.namespaces[host], "link", "set", INTERFACE, "down")

    def connect(self, host: str) -> None:
        """Connect a host again that was cut off."""
        call("ip", "-n", self.namespaces[host], "link", "set", INTERFACE, "up")


@contextmanager
def network(addresses: Mapping[str, str], switch_address: str = "") -> Iterator[Network]:
    """Create the network for hosts with these addresses of a /24, and remove it with all processes in it.

    With ``switch_address`` the switch is a host too. Raises LackError without permission.
    """
    names = {host: f"pst-ds-{os.getpid()}-{host}" for host in (SWITCH, *addresses)}
    with ExitStack() as stack:
        for namespace in names.values():
            _allowed("ip", "netns", "add", namespace)
            stack.callback(call, "ip", "netns", "delete", namespace)
        found = Network(names)
        for host in names:
            stack.callback(_kill_all_on, found, host)
        switch = names[SWITCH]
        _allowed("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        if switch_address:
            call("ip", "-n", switch, "address", "add", f"{switch_address}/24", "dev", "bridge")
        for number, (host, address) in enumerate(addresses.items()):
            cable = ("peer", "name", INTERFACE, "netns", names[host])
            _allowed("ip", "-n", switch, "link", "add", f"port{number}", "type", "veth", *cable)
            call("ip", "-n", switch, "link", "set", f"port{number}", "master", "bridge", "up")
            call("ip", "-n", names[host], "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                call("ip", "-n", names[host], "link", "set", interface, "up")
        for interface in ("lo", "bridge"):
            call("ip", "-n", switch, "link", "set", interface, "up")
        yield found


def _kill_all_on(laid: Network, host: str) -> None:
    kill_all(laid.processes(host))


def _allowed(*command: str) -> None:
    """Run a command that a container may forbid. Raises LackError."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise LackError(f"'{' '.join(command[:4])}' is refused here: {done.stderr.strip()}")
