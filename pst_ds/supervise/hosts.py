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
# Placeholders in the words of launchers and checks.
HOSTFILE = "{hostfile}"
EXCLUDED = "{excluded}"
HOST = "{host}"


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
        # All or none: with some faulty hosts left in, the next start would fail in the same way.
        if len(self.left_out) + len(new) > self.spares:
            return []
        self.left_out += new
        return new

    def unwell(self) -> list[str]:
        """Return the hosts in use on which the check fails or times out."""
        if not self.check:
            return []
        # spares too, since a spare may replace a host in the next start
        asked = [name for name in self.lines if name not in self.left_out]
        with ThreadPoolExecutor(max_workers=32) as pool:  # a check of a dead host takes its whole timeout
            answers = list(pool.map(self._is_well, asked))
        return [name for name, is_well in zip(asked, answers, strict=True) if not is_well]

    def filled_in(self, launcher: Sequence[str], hostfile: Path) -> list[str]:
        """Write the current hosts to ``hostfile`` and return the launcher's words with placeholders replaced. Words
        with {excluded} are omitted while no host is excluded."""
        if self.lines:
            hostfile.write_text("".join(f"{self.lines[name]}\n" for name in self.used), encoding="utf-8")
        excluded = ",".join(self.left_out)
        words = []
        for word in launcher:
            if EXCLUDED in word and not self.left_out:
                continue
            words.append(word.replace(HOSTFILE, str(hostfile)).replace(EXCLUDED, excluded))
        return words

    def _known(self, name: str) -> str:
        """Return a host's name in the hostfile, with or without its domain; "" for unknown hosts."""
        if not self.lines or name in self.lines:
            return name
        # A rank reports the name that its system has, which need not be the hostfile's.
        short_name = name.split(".")[0]
        for known in self.lines:
            if known.split(".")[0] == short_name:
                return known
        return ""

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
    words = " ".join(launcher)
    has_hostfile = HOSTFILE in words
    if has_hostfile != bool(path):
        its_hostfile = "a" if has_hostfile else "no"
        is_given = "" if path else "not "
        raise InputError(
            f"--by {shlex.join(launcher)!r} has {its_hostfile} {HOSTFILE}, and --hostfile is "
            f"{is_given}given: give both, such as --hostfile hosts.txt --by 'launch/multinode.sh "
            f"--hostfile {HOSTFILE}'"
        )
    if spares and not has_hostfile and EXCLUDED not in words:
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
        for line in map(str.strip, text.splitlines()):
            if line and not line.startswith("#"):
                lines[line.split()[0]] = line  # the name, which other words may follow, such as slots
        if len(lines) <= spares:
            raise InputError(f"--spares {spares} leaves none of the {len(lines)} hosts in {path!r}; name fewer spares")
    return Hosts(lines, spares, shlex.split(check))
