"""Two hosts on this machine: each with an address, a name, processes and an sshd of its own; a cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.cluster.namespaces import INTERFACE, Network, network
from tools.cluster.processes import (
    Background,
    call,
    ended_after,
    environment,
    kill_all,
    require,
    search_path,
    wait_until,
)

UP_SECONDS = 30
ADDRESSES = {"host-a": "10.213.77.1", "host-b": "10.213.77.2"}


@dataclass(frozen=True)
class Hosts:
    """Hosts that are up. ssh knows them by name; nothing else does."""

    folder: Path
    network: Network

    @property
    def hostfile(self) -> str:
        return str(self.folder / "hostfile")

    def environment(self, **changes: str) -> dict[str, str]:
        """With an ssh that knows the hosts. Their names do not resolve, so gloo is told where to listen."""
        path = f"{self.folder / 'bin'}{os.pathsep}{search_path()}"
        return environment(**{"PATH": path, "GLOO_SOCKET_IFNAME": INTERFACE, **changes})


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Brings them up, and ends all their processes and removes them."""
    require("ip", "unshare", "sshd", "ssh", "ssh-keygen", "pdsh")
    with ExitStack() as stack:
        hosts = Hosts(folder, stack.enter_context(network(ADDRESSES)))
        _write_ssh_files(hosts)
        if not Path("/run/sshd").exists():  # sshd insists on this folder; its package makes it only at boot
            Path("/run/sshd").mkdir(mode=0o755)
            stack.callback(Path("/run/sshd").rmdir)
        for host in ADDRESSES:
            sshd_there = f"hostname {host} && exec {_absolute('sshd')} -D -e -f {folder}/sshd-{host}"
            apart = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "--uts")
            command = hosts.network.on(host, *apart, "sh", "-c", sshd_there)
            sshd = stack.enter_context(ended_after(Background(folder / f"sshd-{host}.log", *command)))
            stack.callback(lambda host=host: kill_all(hosts.network.processes(host)))
            wait_until(lambda host=host: _answers(hosts, host), UP_SECONDS, sshd.text)
        yield hosts


def _absolute(program: str) -> str:
    """sshd starts itself anew by its path."""
    return str(shutil.which(program, path=search_path()))


def _write_ssh_files(hosts: Hosts) -> None:
    folder = hosts.folder
    for name in ("user_key", "host_key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    host_key = (folder / "host_key.pub").read_text(encoding="utf-8")
    (folder / "authorized_keys").write_bytes((folder / "user_key.pub").read_bytes())
    (folder / "known_hosts").write_text("".join(f"{host} {host_key}" for host in ADDRESSES), encoding="utf-8")
    ssh = f"IdentityFile {folder}/user_key\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\nUser root\n"
    for host, address in ADDRESSES.items():
        ssh += f"Host {host}\n HostName {address}\n HostKeyAlias {host}\n"
        (folder / f"sshd-{host}").write_text(
            f"ListenAddress {address}:22\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\n"
            "PermitRootLogin yes\nPasswordAuthentication no\nStrictModes no\nUsePAM no\nPidFile none\n",
            encoding="utf-8",
        )
    (folder / "ssh_config").write_text(ssh, encoding="utf-8")
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec "{_absolute("ssh")}" -F "{folder}/ssh_config" "$@"\n', encoding="utf-8")
    wrapper.chmod(0o755)
    (folder / "hostfile").write_text("".join(f"{host} slots=1\n" for host in ADDRESSES), encoding="utf-8")


def _answers(hosts: Hosts, host: str) -> bool:
    command = hosts.network.on(host, str(hosts.folder / "bin" / "ssh"), "-oBatchMode=yes", host, "true")
    done = subprocess.run(command, env=hosts.environment(), capture_output=True, timeout=60, check=False)
    return done.returncode == 0
