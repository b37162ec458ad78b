"""Copy finished checkpoints of a run to another place, such as an object store, and fetch them from there.

The mirror has the folders of the run's ``checkpoints``, with the same files. It has no renames, so a checkpoint counts
once its manifest is there, which is written last and removed first.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import TypedDict

from pst_ds.atomic_files import PARTIAL, publish, write_new
from pst_ds.checkpoint.format import MANIFEST, SUMS, CheckpointError, listed_files, listed_sums, open_checkpoint
from pst_ds.checkpoint.retention import step_name
from pst_ds.errors import first_line
from pst_ds.file_names import STEP_FOLDER, step_folders
from pst_ds.parallel.ranks import all_gather_objects, of_main, on_all_ranks_at_length, rank, world_size
from pst_ds.parallel.store import StoreGroup
from pst_ds.remote_folder import RemoteFolder

_PATIENCE_SECONDS = 3600.0
"""How long a rank waits for another to copy its files. A lost rank ends the run much earlier."""


@dataclass(frozen=True, slots=True)
class CopyResult:
    """The outcome of a copy; the same on every rank."""

    name: str
    bytes: int
    """Size of all files."""
    seconds: float
    """Time from the start of the copy to its manifest, in the background."""
    error: str = ""
    """Why the mirror lacks the checkpoint, with the rank; empty after success."""


class _Report(TypedDict):
    """A rank's report on the files that it has copied; JSON, as a StoreGroup sends it."""

    error: str
    bytes: int


class CheckpointMirror:
    """Copies checkpoints of ``folder`` into a remote folder, one after another. Creating a mirror is collective.

    A thread of each rank copies every n-th file of n ranks, so that no host sends everything. If checkpoints are
    written faster than they are copied, the newest comes next, and those between are not copied.
    """

    def __init__(self, folder: Path, remote: RemoteFolder, when_copied: Callable[[], None]):
        """``when_copied`` is called on rank 0, in the thread, once a copy is complete and before older ones go."""
        self._folder = folder
        self._remote = remote
        self._when_copied = when_copied
        self._group = StoreGroup(_PATIENCE_SECONDS)
        self._changed = Condition()
        self._waiting: list[str] = []
        """Checkpoints to copy, oldest first; ranks have added the same, but maybe not all of them yet."""
        self._copying = ""
        self._results: list[CopyResult] = []
        self._thread: Thread | None = None

    @property
    def address(self) -> str:
        """Address of the mirror, for messages."""
        return self._remote.address

    def add(self, name: str) -> None:
        """Copy ``folder/name``, which is complete, soon. All ranks add the same names in one order, in any thread."""
        with self._changed:
            self._waiting.append(name)
            if self._thread is None:
                self._thread = Thread(target=self._copy_all, daemon=True)
                self._thread.start()

    def in_use(self) -> frozenset[str]:
        """Return the checkpoints that are being copied or wait for it."""
        with self._changed:
            return frozenset({*self._waiting, self._copying})

    def results(self) -> list[CopyResult]:
        """Return the outcomes since the last call, oldest first."""
        with self._changed:
            results = self._results
            self._results = []
        return results

    def wait(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for all copies; return whether they have ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout)

    def _copy_all(self) -> None:
        """Copy until nothing is left. Collective over the threads of all ranks, which copy in the same order."""
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                newest = self._waiting[-1]
            result = self._copy(newest)
            with self._changed:
                self._copying = ""
                self._results.append(result)

    def _copy(self, newest: str) -> CopyResult:
        """Copy the newest checkpoint that all ranks know of, and forget older ones. Collective over the threads."""
        start = time.monotonic()
        name = newest
        size = 0
        try:
            name, files, problem = self._group.decide(newest, lambda names: self._begin(min(names, key=_step)))
            self._take(name)
            report = _Report(error=problem, bytes=0)
            if not problem:
                report = self._copy_own_files(name, files)
            problem, size = self._group.decide(report, lambda reports: self._finish(name, files, reports))
        except Exception as error:  # the exchange failed: another rank is gone, which training will notice
            self._take(name)
            problem = first_line(error)
        return CopyResult(name, size, round(time.monotonic() - start, 1), problem)

    def _take(self, name: str) -> None:
        """Note that ``name`` is being copied, and forget it and older ones."""
        with self._changed:
            self._copying = name
            self._waiting = [waiting for waiting in self._waiting if _step(waiting) > _step(name)]

    def _begin(self, name: str) -> tuple[str, list[str], str]:
        """Make what the mirror has of ``name`` invalid; return (name, its tensor files, problem). Called on rank 0.

        Other ranks do not list the folder: a network file system may show them its former content for a while.
        """
        files: list[str] = []
        try:
            files = listed_files(self._folder / name)
            files.remove(MANIFEST)
            # before any rank replaces a file, since those of an earlier, damaged copy have the same names
            self._remote.remove(f"{name}/{MANIFEST}")
        except Exception as error:
            return name, files, first_line(error)
        return name, files, ""

    def _copy_own_files(self, name: str, files: list[str]) -> _Report:
        size = 0
        try:
            for file in files[rank() :: world_size()]:
                path = self._folder / name / file
                self._remote.put(path, f"{name}/{file}")
                size += path.stat().st_size
        except Exception as error:  # also MemoryError: the others wait for a report
            return _Report(error=first_line(error), bytes=size)
        return _Report(error="", bytes=size)

    def _finish(self, name: str, files: list[str], reports: Sequence[_Report]) -> tuple[str, int]:
        """Write the sums and the manifest, and remove older copies; return (problem, bytes). Called on rank 0."""
        for number, report in enumerate(reports):
            if report["error"]:
                return f"rank {number}: {report['error']}", 0
        try:
            for left in self._remote.names(name):  # by a copy of another number of ranks that was killed
                if left not in files:
                    self._remote.remove(f"{name}/{left}")
            size = 0
            for report in reports:
                size += report["bytes"]
            # the manifest last, since it makes the copy a checkpoint
            for file in (SUMS, MANIFEST):
                data = (self._folder / name / file).read_bytes()
                self._remote.write(f"{name}/{file}", data)
                size += len(data)
            self._when_copied()
            self._remove_old(name)
        except Exception as error:
            return f"rank 0: {first_line(error)}", 0
        return "", size

    def _remove_old(self, newest: str) -> None:
        """Remove what the run itself no longer keeps."""
        kept = {path.name for path in step_folders(self._folder)} | {newest}
        for name in self._remote.names():
            if STEP_FOLDER.fullmatch(name) and name not in kept:
                remove_copy(self._remote, name)


def _step(name: str) -> int:
    """Return the step of a checkpoint's name."""
    match = STEP_FOLDER.fullmatch(name)
    assert match is not None
    return int(match[1])


def remove_copy(remote: RemoteFolder, name: str) -> None:
    """Remove a checkpoint of a mirror, which is invalid from the start of its removal."""
    remote.remove(f"{name}/{MANIFEST}")
    remote.remove_folder(name)


def has_copy(remote: RemoteFolder, name: str) -> bool:
    """Return whether the mirror has a complete checkpoint ``name``."""
    return remote.exists(f"{name}/{MANIFEST}")


def copies(remote: RemoteFolder) -> list[str]:
    """Return the complete checkpoints of a mirror, newest first."""
    names: list[str] = []
    for name in remote.names():
        if STEP_FOLDER.fullmatch(name) and has_copy(remote, name):
            names.append(name)
    return sorted(names, key=_step, reverse=True)


def fetch_newer(remote: RemoteFolder, folder: Path, step: int) -> tuple[bool, list[str]]:
    """Copy the newest checkpoint after ``step`` from a mirror into ``folder``, and the best one that it names.

    Returns whether there was one, and why others could not be used. Collective: every rank copies a share of the files.
    Raises RemoteError on every rank if the mirror cannot be read.
    """
    problems: list[str] = []
    # only rank 0 asks the mirror, so that all ranks fetch the same
    for name in of_main(lambda: copies(remote)):
        if _step(name) <= step:
            break
        if problem := _fetch(remote, folder, name):
            problems.append(problem)
            continue
        best = of_main(lambda name=name: _missing_best(remote, folder, name))  # type: ignore[misc]
        if best and (problem := _fetch(remote, folder, best)):
            problems.append(problem)
        return True, problems
    return False, problems


def _missing_best(remote: RemoteFolder, folder: Path, name: str) -> str:
    """Return the best checkpoint that a fetched one names, if only the mirror has it; "" otherwise."""
    best_step = open_checkpoint(folder / name).state.progress.get("best_step")
    if not isinstance(best_step, int):
        return ""
    best = step_name(best_step)
    if (folder / best).exists() or not has_copy(remote, best):
        return ""
    return best


def _fetch(remote: RemoteFolder, folder: Path, name: str) -> str:
    """Copy a checkpoint from the mirror into ``folder``; return how it is damaged, or "". Collective."""
    partial = folder / (name + PARTIAL)
    sums, damage = of_main(lambda: _begin_fetch(remote, partial, name))
    files = [file for file in sums if file != MANIFEST]
    damaged: list[str] = []

    def fetch() -> None:
        for file in files[rank() :: world_size()]:
            try:
                digest = remote.get(f"{name}/{file}", partial / file)
            except FileNotFoundError:
                digest = ""
            if digest != sums[file]:
                damaged.append(f"{remote.path(name)}/{file} is damaged: its SHA-256 is not the one in {SUMS}")

    # a store may take longer than a collective waits
    on_all_ranks_at_length(fetch)
    # every rank exchanges what it found, so that all take the same branch below
    for damaged_of_rank in all_gather_objects(damaged):
        if damaged_of_rank:
            damage = damaged_of_rank[0]
            break
    if not damage:
        of_main(lambda: publish(partial, folder / name))
    return damage


def _begin_fetch(remote: RemoteFolder, partial: Path, name: str) -> tuple[dict[str, str], str]:
    """Fetch the manifest and the sums; return the SHA-256 of each other file, and how they are damaged, or ""."""
    partial.mkdir(parents=True, exist_ok=True)
    digests = {}
    for file in (MANIFEST, SUMS):
        try:
            digests[file] = write_new(partial / file, remote.read(f"{name}/{file}"))
        except FileNotFoundError:
            return {}, f"{remote.path(name)}/{file} is missing"
    sums = listed_sums(partial)
    if sums.get(MANIFEST) != digests[MANIFEST]:
        return {}, f"{remote.path(name)}/{MANIFEST} is damaged: its SHA-256 is not the one in {SUMS}"
    try:
        # so that a damaged file of sums cannot name a path elsewhere
        open_checkpoint(partial, list(sums))
    except CheckpointError as error:
        return {}, f"{remote.path(name)}: {error}"
    return sums, ""
