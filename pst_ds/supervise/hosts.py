"""The hosts that a supervised run may use: which are at fault and left out, and which take their place."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pst_ds.errors import InputError

CHECK_SECONDS = 60.0
"""How long a check of a host may take."""
HOSTFILE, EXCLUDED, HOST = "{hostfile}", "{excluded}", "{host}"
"""What a launcher's words, and a check's, may hold for the supervisor to fill in."""


@dataclass(slots=True)
class Hosts:
    """Hosts by name with their lines of a hostfile, or none if the launcher's cluster knows them; ``spares`` of them
    are not used until others are left out."""

    lines: dict[str, str] = field(default_factory=dict)
    spares: int = 0
    check: Sequence[str] = ()
    """A command that ends with 0 on a host that is well, with {host} in its words."""
    left_out: list[str] = field(default_factory=list)

    @property
    def used(self) -> list[str]:
        """Return the hosts that the next start uses; none if they are not known."""
        good = [name for name in self.lines if name not in self.left_out]
        return good[: len(self.lines) - self.spares]

    def leave_out(self, names: Iterable[str]) -> list[str]:
        """Leave these out from now on, unless they are more than there are spares; return which are new."""
        known = [self._known(name) for name in names]
        new = sorted({name for name in known if name and name not in self.left_out})
        if len(self.left_out) + len(new) > self.spares:
            return []
        self.left_out += new
        return new

    def unwell(self) -> list[str]:
        """Return the hosts not yet left out on which the check fails, or does not end."""
        asked = [name for name in self.lines if name not in self.left_out] if self.check else []
        with ThreadPoolExecutor(max_workers=32) as pool:
            return [name for name, is_well in zip(asked, pool.map(self._is_well, asked), strict=True) if not is_well]

    def filled_in(self, launcher: Sequence[str], hostfile: Path) -> list[str]:
        """Return the launcher's words with the hosts of now, which are written to ``hostfile``; a word about hosts that
        are left out is only there if some are."""
        if self.lines:
            hostfile.write_text("".join(f"{self.lines[name]}\n" for name in self.used), encoding="utf-8")
        words = [word for word in launcher if EXCLUDED not in word or self.left_out]
        return [word.replace(HOSTFILE, str(hostfile)).replace(EXCLUDED, ",".join(self.left_out)) for word in words]

    def _known(self, name: str) -> str:
        """Return a host's name in the hostfile, where it may be longer or shorter; "" for one that is not there."""
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
    """Read a hostfile with a line a host, or know none without a ``path``. Raises InputError for one that cannot be
    read, and where the launcher has no place for what it says."""
    has = {place: any(place in word for word in launcher) for place in (HOSTFILE, EXCLUDED)}
    if has[HOSTFILE] != bool(path):
        raise InputError(
            f"--by {shlex.join(launcher)!r} has {'a' if has[HOSTFILE] else 'no'} {HOSTFILE}, and --hostfile is "
            f"{'' if path else 'not '}given: give both, such as --hostfile hosts.txt --by 'launch/multinode.sh "
            f"--hostfile {HOSTFILE}'"
        )
    if spares and not any(has.values()):
        raise InputError(
            f"--spares {spares}, but --by {shlex.join(launcher)!r} does not say which hosts it leaves out: give it "
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
