"""The folder of a run: lock it, write its metadata, and open its checkpoints by name."""

import itertools
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from pst_ds.atomic_files import only_writer, remove_partial, require_writable, write_text_atomic
from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointError
from pst_ds.checkpoint.mirror import copies
from pst_ds.checkpoint.restore import base_fingerprint
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.toml import dump_run
from pst_ds.errors import InputError
from pst_ds.file_names import (
    CHECKPOINTS,
    DEEPSPEED_FILE,
    EXIT_CODES_VARIABLE,
    LAYERS_FILE,
    METRICS_FILE,
    RESULT_FILE,
    RUN_FILE,
    RUN_LOCK,
    SOLVED,
    STALLS,
    SUBMITTED_FILE,
    SUBMITTED_VARIABLE,
    step_folders,
)
from pst_ds.parallel.ranks import all_gather_objects, barrier, is_main, of_main, of_main_at_length, raise_on_all_ranks
from pst_ds.remote_folder import RemoteFolder
from pst_ds.train.resolved import ResolvedRun, resolve
from pst_ds.train.resume import locate_base, require_base

_PATIENCE_SECONDS = 120.0
"""Seconds to wait for a lock. An NFS server keeps the locks of a lost host for 90 seconds."""


@contextmanager
def without_other_runs(folder: Path) -> Iterator[None]:
    """Create the run folder, and lock it in the context; remove created folders after an InputError. Collective.

    Raises ConfigError when the ranks do not all see the same folder, and InputError when another run writes to it.
    """
    # the innermost first, in which order they can be removed
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        _require_shared(folder)
        with ExitStack() as locks:
            # rank 0 has the lock; the others wait for it as long as that takes
            _warn_of_other_runs(of_main_at_length(partial(_lock, folder, locks)))
            yield
    except InputError:
        # a mistyped output_dir leaves nothing behind
        if is_main():
            for path in missing:
                with suppress(OSError):  # never made, or no longer empty
                    path.rmdir()
        raise


def _lock(folder: Path, locks: ExitStack) -> str:
    # under launch/elastic.sh, ranks of the previous start may still be ending
    patience = 0.0
    if EXIT_CODES_VARIABLE in os.environ:
        patience = _PATIENCE_SECONDS
    return locks.enter_context(only_writer(folder / RUN_LOCK, f"output_dir = {str(folder)!r}", patience))


@cache
def _warn_of_other_runs(doubt: str) -> None:
    """Warn once, on rank 0."""
    if doubt and is_main():
        print(f"WARNING: {doubt}. Make sure that no other run writes there", file=sys.stderr, flush=True)


def _require_shared(folder: Path) -> None:
    """Create the folder. Raise InputError on every rank if rank 0 cannot write it, or other ranks do not see it."""
    where = f"output_dir = {str(folder)!r}"

    def write_probe() -> Path:
        require_writable(folder, where)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".shared-{os.getpid()}"
        probe.write_text("")
        return probe

    try:
        probe = of_main(write_probe)
    except OSError as error:
        raise ConfigError(f"{where} cannot be written: {error}; name another folder") from None
    is_there = (folder / probe.name).exists()
    of_ranks = all_gather_objects((is_there, socket.gethostname()))
    # after the exchange, before which a rank may still look for it
    if is_main():
        probe.unlink()
    _, main_host = of_ranks[0]
    for rank, (is_there, host) in enumerate(of_ranks):
        if not is_there:
            raise ConfigError(
                f"{where} is not the same folder on rank {rank} ({host}) as on rank 0 ({main_host}); put it on "
                "a file system that all hosts share: every rank writes its part there"
            )


def require_no_checkpoints(folder: Path) -> None:
    """Raise ConfigError on every rank if a run was saved in ``folder``. Collective."""
    names = of_main(lambda: [path.name for path in step_folders(folder / CHECKPOINTS)])
    if names:
        raise ConfigError(
            f"output_dir = {str(folder)!r} has checkpoints up to {names[0]}: continue them with resume = true, start "
            "over with restart = true, or name another output_dir"
        )


def open_mirror(run: RunConfig, *, resume: bool) -> RemoteFolder | None:
    """Open ``checkpoint.mirror``, if the run has one. Collective.

    Raises InputError on every rank if it cannot be opened or written, or has checkpoints that the run does not resume.
    """
    address = run.checkpoint.mirror
    if not address:
        return None
    mirror = raise_on_all_ranks(lambda: RemoteFolder(address, "checkpoint.mirror"))

    def require_ready() -> None:
        mirror.require_usable(writable=is_main())
        if not is_main() or resume:
            return
        names = copies(mirror)
        if names:
            raise ConfigError(
                f"checkpoint.mirror = {address!r} has checkpoints up to {names[0]}: continue them with resume = true, "
                "or name another folder"
            )

    raise_on_all_ranks(require_ready)
    return mirror


def set_aside_checkpoints(folder: Path) -> None:
    """Rename the checkpoints of an earlier run to a free name; remove unfinished saves. Collective."""
    current = folder / CHECKPOINTS
    if is_main() and current.is_dir():
        checkpoints.clean_up(current)
        entries = list(current.iterdir())
        has_checkpoints = not all(path.is_symlink() for path in entries)
        if not has_checkpoints:
            # links such as "best" without the checkpoints that they name
            for link in entries:
                link.unlink()
        else:
            ending = _free_ending(folder)
            previous = current.rename(folder / f"{CHECKPOINTS}{ending}")
            # renamed alike: the models of its solves are the bases of its checkpoints
            if (folder / SOLVED).is_dir():
                (folder / SOLVED).rename(folder / f"{SOLVED}{ending}")
            print(f"{current} of an earlier run is now {previous}")
    # no rank saves into the folder before rank 0 has renamed it
    barrier()


def _free_ending(folder: Path) -> str:
    """Return ".previous", ".previous-2", ...: the first with which ``folder`` has no checkpoints."""
    ending = ".previous"
    for number in itertools.count(2):
        if not os.path.lexists(folder / f"{CHECKPOINTS}{ending}"):
            break
        ending = f".previous-{number}"
    return ending


def write_files(run: RunConfig, ds_config: Mapping[str, object] | None, *, is_finished: bool) -> None:
    """Write the run's metadata into its folder; remove an old result unless the run ``is_finished``."""
    folder = Path(run.output_dir)
    if not is_finished:
        # a result says that the run in the folder has finished
        (folder / RESULT_FILE).unlink(missing_ok=True)
    # reports of stalls in an earlier start say nothing about this one
    shutil.rmtree(folder / STALLS, ignore_errors=True)
    files = (RUN_FILE, RESULT_FILE, METRICS_FILE, LAYERS_FILE, SUBMITTED_FILE, DEEPSPEED_FILE)
    remove_partial(*(folder / name for name in files))
    write_text_atomic(folder / RUN_FILE, dump_run(run))
    if script := os.environ.get(SUBMITTED_VARIABLE):
        write_text_atomic(folder / SUBMITTED_FILE, script.rstrip("\n") + "\n")
    if ds_config is not None:
        write_text_atomic(folder / DEEPSPEED_FILE, json.dumps(ds_config, indent=1) + "\n")


def open_checkpoint(run: RunConfig, name: str) -> Checkpoint:
    """Open a checkpoint of the run by name; "best" falls back to "final" if no best one was chosen.

    Its base model is that of :func:`pst_ds.train.resume.locate_base`. Raises InputError, also if that is not the model
    that was trained.
    """
    folder = Path(run.output_dir) / CHECKPOINTS
    try:
        checkpoint = checkpoints.read(folder, name)
    except checkpoints.UnknownCheckpointError:
        raise
    except CheckpointError as error:
        there = ", ".join(checkpoints.known_names(folder))
        raise CheckpointError(f"{error}. Name another checkpoint; there are {there}") from None
    base = locate_base(run, checkpoint)
    require_base(checkpoint, base, base_fingerprint(base))
    return checkpoint


def open_trained(run: RunConfig | ResolvedRun, checkpoint: str | Checkpoint) -> tuple[ResolvedRun, Checkpoint]:
    """Open a checkpoint of a run by name, and resolve the run with the classes that it was trained on.

    What is resolved or open already is returned unchanged. Raises InputError.
    """
    if isinstance(checkpoint, str):
        config = run.run if isinstance(run, ResolvedRun) else run
        checkpoint = open_checkpoint(config, checkpoint)
    if isinstance(run, RunConfig):
        run = resolve(run, labels=checkpoint.state.labels)
    return run, checkpoint


def same_on_all_ranks(run: RunConfig, checkpoint: Checkpoint) -> Checkpoint:
    """Return the newest of the checkpoints that the ranks have opened by one name. Collective.

    The run may have saved between the readings of two ranks. Raises InputError on all ranks if a rank cannot open it.
    """
    # names have the step with leading zeros, so the last one by name is the newest
    newest = max(all_gather_objects(checkpoint.folder.name))

    def open_newest() -> Checkpoint:
        if checkpoint.folder.name == newest:
            return checkpoint
        return open_checkpoint(run, newest)

    return raise_on_all_ranks(open_newest)
