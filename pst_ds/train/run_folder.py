"""The folder of a run: one that all ranks share, and its checkpoints to start, continue or read from."""

from __future__ import annotations

import itertools
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pst_ds.atomic_files import require_writable
from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointError, read_checkpoint
from pst_ds.checkpoint.restore import base_fingerprint
from pst_ds.config.file_names import CHECKPOINTS
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.errors import InputError
from pst_ds.parallel.ranks import all_gather_objects, barrier, is_main, raise_on_all_ranks
from pst_ds.train.resume import require_base, require_same_run


@contextmanager
def shared_folder(folder: Path) -> Iterator[None]:
    """Create ``folder``; remove what was created for it if the input inside is bad. Collective.

    Raises ConfigError when the ranks do not all see the same folder.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _require_shared(folder)
        yield
    except InputError:
        for path in made if is_main() else ():
            with suppress(OSError):  # never made, or no longer empty
                path.rmdir()
        raise


def _require_shared(folder: Path) -> None:
    probe, problem = folder / f".shared-{os.getpid()}", ""
    try:
        if is_main():
            require_writable(folder, f"output_dir = {str(folder)!r}")
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
    except InputError as error:
        problem = str(error)
    except OSError as error:
        problem = f"output_dir = {str(folder)!r} cannot be written: {error}; name another folder"
    name, problem = all_gather_objects((probe.name, problem))[0]
    seen = bool(problem) or (folder / name).exists()
    everywhere = all_gather_objects((seen, socket.gethostname()))
    if problem:
        raise ConfigError(problem)
    if is_main():
        probe.unlink()
    blind = [(i, host) for i, (there, host) in enumerate(everywhere) if not there]
    if blind:
        raise ConfigError(
            f"output_dir = {str(folder)!r} is not the same folder on rank {blind[0][0]} ({blind[0][1]}) as on rank 0 "
            f"({everywhere[0][1]}); put it on a file system that all hosts share: every rank writes its part there"
        )


def require_same_everywhere(digest: str, setting: str, value: str) -> None:
    """Raise ConfigError unless all ranks have the same ``digest``. Collective."""
    ranks = all_gather_objects((digest, socket.gethostname()))
    for i, (other, host) in enumerate(ranks):
        if other != ranks[0][0]:
            raise ConfigError(
                f"{setting} = {value!r} is another text on rank {i} ({host}) than on rank 0 ({ranks[0][1]}); every "
                "host must read the same file"
            )


def require_no_checkpoints(folder: Path) -> None:
    """Raise ConfigError on every rank if a run was saved in ``folder``. Collective."""
    names = [path.name for path in checkpoints.step_folders(folder / CHECKPOINTS)]
    there = all_gather_objects(names)[0]
    if there:
        raise ConfigError(
            f"output_dir = {str(folder)!r} has checkpoints up to {there[0]}: continue them with --resume, begin anew "
            "with --restart, or name another output_dir"
        )


def set_aside_checkpoints(folder: Path) -> None:
    """Rename the checkpoints of an earlier run to a free name; remove unfinished saves. Collective."""
    made = folder / CHECKPOINTS
    if is_main() and made.is_dir():
        checkpoints.clean_up(made)
        there = list(made.iterdir())
        if all(path.is_symlink() for path in there):
            for link in there:
                link.unlink()
        else:
            previous = _free_name(folder / f"{CHECKPOINTS}.previous")
            made.rename(previous)
            print(f"{made} of an earlier run is now {previous}")
    barrier()


def _free_name(path: Path) -> Path:
    """Return ``path``, with "-2", "-3" and so on after it where it is taken."""
    names = (path.with_name(f"{path.name}-{i}" if i > 1 else path.name) for i in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def checkpoint_to_go_on_from(run: RunConfig, data_digest: str, *, quiet: bool) -> Checkpoint | None:
    """Return the newest valid checkpoint of the run, if it has one. Raises InputError. Collective."""
    folder = Path(run.output_dir) / CHECKPOINTS
    if is_main():
        checkpoints.clean_up(folder)
    barrier()
    checkpoint, problems = checkpoints.newest_valid(folder)
    messages = [f"WARNING: {problem}. It is set aside as {checkpoints.BROKEN}" for problem in problems]
    if checkpoint is None and problems:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(problems)}. --restart begins anew")
    if checkpoint is None:
        messages.append(f"nothing was saved in {folder} yet: beginning at step 0")
    else:
        fingerprint = base_fingerprint(run.model.path)
        changed = raise_on_all_ranks(lambda: require_same_run(checkpoint, run, fingerprint, data_digest))
        messages.append(f"going on from {checkpoint.folder}, after step {checkpoint.state.step}")
        messages += [f"  with {change}" for change in changed]
    if is_main() and not quiet:
        print("\n".join(messages), file=sys.stderr, flush=True)
    return checkpoint


def open_checkpoint(run: RunConfig, name: str) -> Checkpoint:
    """Open a checkpoint of the run by name; "best" falls back to "final" when none was chosen.

    Raises InputError, also when the base model is not the one that was trained.
    """
    folder = Path(run.output_dir) / CHECKPOINTS
    path = checkpoints.find(folder, name)
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        there = ", ".join(checkpoints.known_names(folder))
        raise CheckpointError(f"{error}. Name another with --checkpoint; there are {there}") from None
    require_base(checkpoint, run.model.path, base_fingerprint(run.model.path))
    return checkpoint
