"""Hosts of a supervised run: check them, exclude faulty ones, and use spares instead."""

import shlex
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pst_ds.errors import InputError

CHECK_SECONDS = 60.0
"""Timeout of the check of a host in seconds."""
HOSTFILE, EXCLUDED, HOST = "{hostfile}", "{excluded}", "{host}"
"""Placeholders in the words of launchers and checks."""


@dataclass(slots=True)
class Hosts:
    """Hosts by name with their lines of a hostfile, empty if the launcher's cluster knows them. ``spares`` of them are
    unused until others are excluded."""

    lines: dict[str, str] = field(default_factory=dict)
    spares: int = 0
    check: Sequence[str] = ()
    """Words of a command that exits with 0 for a healthy host; {host} is its name."""
    left_out: list[str] = field(default_factory=list)

    @property
    def used(self) -> list[str]:
        """Hosts of the next start; empty if they are not known."""
        good = [name for name in self.lines if name not in self.left_out]
        return good[: len(self.lines) - self.spares]

    def leave_out(self, names: Iterable[str]) -> list[str]:
        """Exclude hosts unless there are not enough spares, and return the newly excluded ones."""
        known = [self._known(name) for name in names]
        new = sorted({name for name in known if name and name not in self.left_out})
        if len(self.left_out) + len(new) > self.spares:
            return []
        self.left_out += new
        return new

    def unwell(self) -> list[str]:
        """Return the hosts in use on which the check fails or times out."""
        asked = [name for name in self.lines if name not in self.left_out] if self.check else []
        with ThreadPoolExecutor(max_workers=32) as pool:
            return [name for name, is_well in zip(asked, pool.map(self._is_well, asked), strict=True) if not is_well]

    def filled_in(self, launcher: Sequence[str], hostfile: Path) -> list[str]:
        """Write the current hosts to ``hostfile`` and return the launcher's words with placeholders replaced. Words
        with {excluded} are omitted while no host is excluded."""
        if self.lines:
            hostfile.write_text("".join(f"{self.lines[name]}\n" for name in self.used), encoding="utf-8")
        words = [word for word in launcher if EXCLUDED not in word or self.left_out]
        return [word.replace(HOSTFILE, str(hostfile)).replace(EXCLUDED, ",".join(self.left_out)) for word in words]

    def _known(self, name: str) -> str:
        """Return a host's name in the hostfile, with or without its domain; "" for unknown hosts."""
        if not self.lines or name in self.lines:
            return name
        return next((known for known in self.lines if known.split(".")[0] == name.split(".")[0]), "")

    def _is_well(self, name: str) -> bool:
        words = [word.replace(HOST, name) for word in self.check]
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0


def read_hosts(path: str, spares: int, check: str, launcher: Sequence[str]) -> Hosts:
    """Read a hostfile with one line per host; without ``path`` no host is known. Raises InputError for an unreadable
    file, and for a launcher without the placeholders it needs."""
    has = {place: any(place in word for word in launcher) for place in (HOSTFILE, EXCLUDED)}
    if has[HOSTFILE] != bool(path):
        raise InputError(
            f"--by {shlex.join(launcher)!r} has {'a' if has[HOSTFILE] else 'no'} {HOSTFILE}, and --hostfile is "
            f"{'' if path else 'not '}given: give both, such as --hostfile hosts.txt --by 'launch/multinode.sh "
            f"--hostfile {HOSTFILE}'"
        )
    if spares and not any(has.values()):
        raise InputError(
            f"--spares {spares}, but --by {shlex.join(launcher)!r} does not say which hosts it excludes: give it "
            f"{HOSTFILE} with --hostfile, or {EXCLUDED}, such as 'srun --nodes=4 --exclude={EXCLUDED} …'"
        )
    if check and not path:
        raise InputError("--check asks the hosts of --hostfile, which is not given; leave it out, or name the file")
    lines: dict[str, str] = {}
    if path:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--hostfile {path!r} cannot be read: {error}; name a file with a line a host") from None
        kept = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        lines = {line.split()[0]: line for line in kept}
        if len(lines) <= spares:
            raise InputError(f"--spares {spares} leaves none of the {len(lines)} hosts in {path!r}; name fewer spares")
    return Hosts(lines, spares, shlex.split(check))
