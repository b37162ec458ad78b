"""The checkpoints of a run, ``checkpoints/step-00000120`` and so on: which to keep, and which to resume from.

``latest``, ``best`` and ``final`` are links to them. A folder has its name only once it is complete, so a crash leaves
at most a ``.partial`` one. A damaged one is renamed to ``.broken``, and never used or counted.
"""

import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from pst_ds.atomic_files import OLD, PARTIAL, file_sha256, replace_link, restore_replaced
from pst_ds.checkpoint.format import (
    Checkpoint,
    CheckpointError,
    check_sums,
    listed_files,
    open_checkpoint,
    read_checkpoint,
)
from pst_ds.file_names import BEST, FINAL, LATEST, STEP_FOLDER, step_folders
from pst_ds.parallel.ranks import all_gather_objects, barrier, is_main, of_main, rank, world_size

Known = dict[str, int | None]
"""Step of the best checkpoint as recorded in each good checkpoint, by the checkpoint's name."""

BROKEN = ".broken"
_ATTEMPTS = 20
"""Checkpoints that a reader tries, if a run removes one after the other."""


class UnknownCheckpointError(CheckpointError):
    """A name without a checkpoint."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def clean_up(folder: Path) -> None:
    """Remove incomplete checkpoints that a killed process left. No process may be writing."""
    if not folder.is_dir():
        return
    # First, since a checkpoint that was being replaced may exist under its old name only.
    for path in list(folder.glob(f"step-*{OLD}")):
        restore_replaced(path.with_name(path.name.removesuffix(OLD)))
    # Folders of checkpoints, and links that were being replaced: their temporary names start with a dot.
    for path in [*folder.glob(f"step-*{PARTIAL}"), *folder.glob(f".*{PARTIAL}")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest undamaged checkpoint, and the problems of newer ones; the same on every rank. Collective.

    Damaged ones are renamed. Every rank verifies a share of the files.
    """
    problems: list[str] = []
    # Rank 0's list for all: another host may still see an older state of a shared folder.
    names = of_main(lambda: [path.name for path in step_folders(folder)])
    for name in names:
        checkpoint, problem = _verified(folder / name)
        if checkpoint is not None:
            return checkpoint, problems
        problems.append(problem)
        if is_main():
            broken = folder / (name + BROKEN)
            shutil.rmtree(broken, ignore_errors=True)
            (folder / name).rename(broken)
        barrier()  # no rank continues while the damaged checkpoint still has its name
    return None, problems


def _verified(path: Path) -> tuple[Checkpoint | None, str]:
    """Return the verified checkpoint, or the first problem that a rank found. Collective."""
    checkpoint = None
    sums: dict[str, str] = {}
    problem = ""
    try:
        names = of_main(lambda: listed_files(path))
        checkpoint = open_checkpoint(path, names)
        sums = {name: file_sha256(path / name) for name in names[rank() :: world_size()]}
        for file in range(rank(), checkpoint.contents.num_shards, world_size()):
            checkpoint.check_file(file)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    # Every rank gets here, with or without a problem, since the others wait in the exchange.
    problems: list[str] = []
    all_sums: dict[str, str] = {}
    for problem_of_rank, sums_of_rank in all_gather_objects((problem, sums)):
        problems.append(problem_of_rank)
        all_sums |= sums_of_rank
    problem = _first_problem(problems)
    if not problem:
        try:
            check_sums(path, all_sums)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        # all ranks have read the folder before rank 0 renames it, and all report the same problem
        problem = _first_problem(all_gather_objects(problem))
    if problem:
        return None, problem
    return checkpoint, ""


def _first_problem(problems: Iterable[str]) -> str:
    """Return the first of the problems of ranks that is not empty, or ""."""
    return next(filter(None, problems), "")


def keep(folder: Path, keep_last: int, known: Known | None = None, in_use: Collection[str] = frozenset()) -> list[str]:
    """Remove all but the newest ``keep_last`` good checkpoints and the best ones that they name; return the names.

    Those ``in_use``, which are being copied elsewhere, stay as well.

    A checkpoint is good if it is in ``known``, or if its manifest is intact and its files have their full length; it is
    then added to ``known``. A bad one is removed only if it is older than ``keep_last`` good ones.
    """
    if known is None:
        known = {}
    best: set[str] = set()
    older: list[Path] = []
    num_good = 0
    for path in step_folders(folder):  # the newest first
        if num_good == keep_last:
            older.append(path)
        elif path.name in known or _learn(path, known):
            num_good += 1
            best_step = known[path.name]
            if best_step is not None:
                best.add(step_name(best_step))
    removed: list[str] = []
    for path in older:
        if path.name in best or path.name in in_use:
            continue
        doomed = path.with_name(path.name + PARTIAL)  # if rmtree is interrupted, clean_up removes the rest
        path.rename(doomed)
        shutil.rmtree(doomed)
        removed.append(path.name)
    return removed


def _learn(path: Path, known: Known) -> bool:
    """Return whether a checkpoint is good, and add it to ``known`` if so."""
    try:
        checkpoint = open_checkpoint(path)
        for file in range(checkpoint.contents.num_shards):
            checkpoint.check_file(file)
    except (CheckpointError, OSError):
        return False
    known[path.name] = checkpoint.state.progress.get("best_step")
    return True


def settle(
    folder: Path,
    step: int,
    *,
    best_step: int | None,
    is_last: bool,
    keep_last: int,
    known: Known | None = None,
    in_use: Collection[str] = frozenset(),
) -> None:
    """Point the links to the checkpoint of ``step``, and remove checkpoints that are no longer needed.

    Also repairs links after a crash between writing a checkpoint and this call. ``known``: checkpoints that this
    process wrote or verified, which :func:`keep` does not read again. ``in_use``: checkpoints that it keeps.
    """
    step_of_link = {LATEST: step, BEST: best_step, FINAL: step if is_last else None}
    for link, linked_step in step_of_link.items():
        if linked_step is not None and (folder / step_name(linked_step)).is_dir():
            replace_link(folder / link, step_name(linked_step))
        elif (folder / link).is_symlink() and not (folder / link).exists():
            (folder / link).unlink()  # its checkpoint was damaged
    # Last: a crash in between leaves a checkpoint too many, and no link to a removed one.
    keep(folder, keep_last, known=known, in_use=in_use)


def find(folder: Path, name: str) -> Path:
    """Return the folder of a checkpoint by name; "best" is "final" if none was chosen.

    Raises UnknownCheckpointError.
    """
    path = folder / name
    if name == BEST and not path.exists():
        path = folder / FINAL
    if path.is_symlink():
        target = path.readlink()
        # A run makes no other links. One that leads elsewhere came with a copied folder, and is not followed.
        if not STEP_FOLDER.fullmatch(str(target)) or (folder / target).is_symlink():
            raise UnknownCheckpointError(
                f"{path} is a link to {str(target)!r}; it must name a checkpoint in the same folder"
            )
        path = folder / target
    if not path.is_dir():
        names = ", ".join(known_names(folder)) or "none; train the run first"
        raise UnknownCheckpointError(f"no checkpoint {name!r} in {folder.absolute()}. There are: {names}")
    return path


def read(folder: Path, name: str) -> Checkpoint:
    """Return the verified checkpoint that :func:`find` finds, with its files held.

    A run that is training may remove a checkpoint while it is read. If ``name`` is a link, the reading starts again
    with the checkpoint that the link names by then. Raises CheckpointError.
    """
    problem = CheckpointError(f"{folder / name} cannot be read")
    for _ in range(_ATTEMPTS):
        try:
            path = find(folder, name)
        except UnknownCheckpointError as error:
            if not _is_link_to_step(folder, name):
                raise
            problem = error  # the link's checkpoint is gone: the run is about to move the link
            continue
        try:
            return read_checkpoint(path)
        except CheckpointError:
            if path.is_dir():
                raise
        except OSError as error:
            if path.is_dir():
                raise CheckpointError(str(error)) from None
        if path.name == name:
            raise CheckpointError(
                f"{path} was removed while it was read, because the run keeps checkpoint.keep_last checkpoints and the "
                "best one. Raise checkpoint.keep_last, or read latest"
            )
        problem = CheckpointError(
            f"{path} and {_ATTEMPTS - 1} before it were removed while they were read, because the run saves faster. "
            "Raise checkpoint.keep_last or checkpoint.interval"
        )
    raise problem


def _is_link_to_step(folder: Path, name: str) -> bool:
    """Return whether a link names a checkpoint in ``folder``, which may be gone."""
    try:
        return STEP_FOLDER.fullmatch(os.readlink(folder / name)) is not None
    except OSError:
        return False


def known_names(folder: Path) -> list[str]:
    """Return the names that :func:`find` knows in ``folder``."""
    links = [link for link in (BEST, FINAL, LATEST) if (folder / link).is_dir()]
    return [*links, *(path.name for path in step_folders(folder))]
