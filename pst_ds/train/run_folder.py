"""The folder of a run: locking and writing it, and resuming from its checkpoints."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pst_ds.atomic_files import only_writer, remove_partial, require_writable, write_text_atomic
from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointError, read_checkpoint
from pst_ds.checkpoint.restore import base_fingerprint, load_optimizer, same_base
from pst_ds.config.one_shot import OneShotConfig
from pst_ds.config.run import ConfigError, QuantizationConfig, RunConfig
from pst_ds.config.settings import OnResume, resume_rules
from pst_ds.config.toml import REMOVED, dump_run, flatten
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
    STALLS,
    SUBMITTED_FILE,
    SUBMITTED_VARIABLE,
    step_folders,
)
from pst_ds.masks.update import mask_stats
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.optimizer_state import set_counters
from pst_ds.parallel.ranks import (
    all_gather_objects,
    barrier,
    is_main,
    of_main,
    of_main_at_length,
    raise_on_all_ranks,
    world_size,
)
from pst_ds.train.run_context import RunContext
from pst_ds.train.run_progress import LoopState, RunProgress

P = ParamSpec("P")
T = TypeVar("T")

_PATIENCE_SECONDS = 120.0
"""Seconds to wait for a lock. An NFS server keeps the locks of a lost host for 90 seconds."""


def without_other_runs(work: Callable[Concatenate[RunContext, P], T]) -> Callable[Concatenate[RunContext, P], T]:
    """Decorate a function that writes to its context's run folder: create the folder and lock it until the function
    returns; remove created folders after an InputError.

    The decorated function is collective. It raises ConfigError when the ranks do not all see the same folder, and
    InputError when another run writes to it.
    """

    @wraps(work)
    def locked(context: RunContext, *more: P.args, **settings: P.kwargs) -> T:
        folder = Path(context.run.output_dir)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            _require_shared(folder)
            with ExitStack() as locks:
                _warn_of_other_runs(of_main_at_length(partial(_lock, folder, locks)))
                return work(context, *more, **settings)
        except InputError:
            for path in made if is_main() else ():
                with suppress(OSError):  # never made, or no longer empty
                    path.rmdir()
            raise

    return locked


def _lock(folder: Path, locks: ExitStack) -> str:
    # under pst-ds launch, ranks of the previous start may still be ending
    patience = _PATIENCE_SECONDS if EXIT_CODES_VARIABLE in os.environ else 0.0
    return locks.enter_context(only_writer(folder / RUN_LOCK, f"output_dir = {str(folder)!r}", patience))


@cache
def _warn_of_other_runs(doubt: str) -> None:
    """Warn once, on rank 0."""
    if doubt and is_main():
        print(f"WARNING: {doubt}. Make sure that no other run writes there", file=sys.stderr, flush=True)


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


def require_same_everywhere(digest: str, what: str) -> None:
    """Raise ConfigError unless all ranks have the same ``digest`` of ``what``. Collective."""
    ranks = all_gather_objects((digest, socket.gethostname()))
    for i, (other, host) in enumerate(ranks):
        if other != ranks[0][0]:
            raise ConfigError(
                f"{what} differs between rank 0 ({ranks[0][1]}) and rank {i} ({host}). Give every host the same file."
            )


def require_no_checkpoints(folder: Path) -> None:
    """Raise ConfigError on every rank if a run was saved in ``folder``. Collective."""
    names = [path.name for path in step_folders(folder / CHECKPOINTS)]
    there = all_gather_objects(names)[0]
    if there:
        raise ConfigError(
            f"output_dir = {str(folder)!r} has checkpoints up to {there[0]}: continue them with --resume, start over "
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
            names = (f"{CHECKPOINTS}.previous" + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
            previous = next(folder / name for name in names if not os.path.lexists(folder / name))
            made.rename(previous)
            print(f"{made} of an earlier run is now {previous}")
    barrier()


def write_files(run: RunConfig, ds_config: Mapping[str, object] | None, *, is_finished: bool) -> None:
    """Write the run's metadata into its folder; remove an old result unless the run ``is_finished``."""
    folder = Path(run.output_dir)
    if not is_finished:
        (folder / RESULT_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / STALLS, ignore_errors=True)
    files = (RUN_FILE, RESULT_FILE, METRICS_FILE, LAYERS_FILE, SUBMITTED_FILE, DEEPSPEED_FILE)
    remove_partial(*(folder / name for name in files))
    write_text_atomic(folder / RUN_FILE, dump_run(run))
    if script := os.environ.get(SUBMITTED_VARIABLE):
        write_text_atomic(folder / SUBMITTED_FILE, script.rstrip("\n") + "\n")
    if ds_config is not None:
        write_text_atomic(folder / DEEPSPEED_FILE, json.dumps(ds_config, indent=1) + "\n")


def checkpoint_to_go_on_from(run: RunConfig, data_digest: str, *, quiet: bool) -> Checkpoint | None:
    """Return the newest valid checkpoint of the run, if it has one. Raises InputError. Collective."""
    folder = Path(run.output_dir) / CHECKPOINTS
    if is_main():
        checkpoints.clean_up(folder)
    barrier()
    checkpoint, problems = checkpoints.newest_valid(folder)
    messages = [f"WARNING: {problem}. It is set aside as {checkpoints.BROKEN}" for problem in problems]
    if checkpoint is None and problems:
        raise CheckpointError(f"no checkpoint in {folder} is valid: {'; '.join(problems)}. --restart starts over")
    if checkpoint is None:
        messages.append(f"nothing was saved in {folder} yet: starting at step 0")
    else:
        fingerprint = of_main(lambda: base_fingerprint(run.model.path))
        changed = raise_on_all_ranks(lambda: require_same_run(checkpoint, run, fingerprint, data_digest))
        messages.append(f"resuming from {checkpoint.folder}, after step {checkpoint.state.step}")
        messages += [f"  with {change}" for change in changed]
    if is_main() and not quiet:
        print("\n".join(messages), file=sys.stderr, flush=True)
    return checkpoint


def open_checkpoint(run: RunConfig, name: str) -> Checkpoint:
    """Open a checkpoint of the run by name; "best" falls back to "final" when none was chosen.

    The base model is read from the run's ``model.path``. Raises InputError, also when that is another model than the
    one that was trained.
    """
    folder = Path(run.output_dir) / CHECKPOINTS
    path = checkpoints.find(folder, name)
    try:
        checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        there = ", ".join(checkpoints.known_names(folder))
        raise CheckpointError(f"{error}. Name another with --checkpoint; there are {there}") from None
    require_base(checkpoint, run.model.path, base_fingerprint(run.model.path))
    checkpoint.state = replace(checkpoint.state, base_path=run.model.path)
    return checkpoint


def reached(checkpoint: Checkpoint | None) -> tuple[int, float]:
    """Return the step that ``checkpoint`` was saved after, and how many seconds the run had taken; zeros for None."""
    return (checkpoint.state.step, RunProgress.read(checkpoint).seconds) if checkpoint else (0, 0.0)


def require_same_run(checkpoint: Checkpoint, run: RunConfig, fingerprint: str, data_digest: str) -> list[str]:
    """Raise ConfigError when ``run`` is not the run of ``checkpoint``; return the permitted changes, as text."""
    progress = RunProgress.read(checkpoint)
    require_base(checkpoint, run.model.path, fingerprint)
    # a checkpoint may be older than these settings
    unset = flatten({"quantization": asdict(QuantizationConfig()), "start": asdict(OneShotConfig())})
    before, now = unset | flatten(progress.run), flat_table(run)
    changed = [key for key in now | before if before.get(key) != now.get(key)]  # pst.seed after the seed it may follow
    rules = resume_rules(RunConfig)
    for key in changed:
        if key not in rules and key not in REMOVED:
            raise ConfigError(
                f"{key} = {now.get(key)!r}, but the run in {checkpoint.folder} has {before.get(key)!r}, and a run goes "
                "on only as it began. Fix: take the old value, or start a new run in another output_dir"
            )
    if data_digest != progress.data_digest:
        raise ConfigError(
            f"{run.data.trained_on} is not the text that the run in {checkpoint.folder} began with (its "
            "tokens or labels differ, or data.document_mask), so the batches would be others. Fix: bring the old file "
            "or setting back, or start a new run in another output_dir"
        )
    if progress.loop.streams:
        _require_same_readers(run, len(progress.loop.streams), before)
    return [f"{key} = {now[key]!r} (was {before[key]!r})" for key in changed if rules.get(key) is OnResume.IS_REPORTED]


def _require_same_readers(run: RunConfig, readers: int, before: Mapping[str, object]) -> None:
    """Raise ConfigError unless the streams of ``run`` are dealt out as they were to so many ``readers``."""
    accumulation = "train.gradient_accumulation_steps"
    was = (readers, before[accumulation])
    now = (world_size() // run.train.sequence_parallel, run.train.gradient_accumulation_steps)
    if now != was:
        raise ConfigError(
            f"data.sources has a stream ({run.data.streams[0].path!r}), of which {was[0]} readers have read a part "
            f"each, with {accumulation} = {was[1]}, and here are {now[0]} with {now[1]}. Fix: start so many ranks "
            "again, times train.sequence_parallel, and with that setting; or start a new run in another output_dir"
        )


def require_base(checkpoint: Checkpoint, path: str, fingerprint: str) -> None:
    """Raise ConfigError unless ``fingerprint``, of the model at ``path``, is that of the checkpoint's base model."""
    if not same_base(fingerprint, checkpoint.state.base_fingerprint):
        raise ConfigError(
            f"model.path = {path!r} is not the base model that {checkpoint.folder} was trained from (its fingerprint "
            "differs); point --set model.path= at the right one"
        )


def as_table(run: RunConfig) -> dict[str, Any]:
    """Return ``run`` as JSON values, with the seed that its factors follow."""
    return json.loads(json.dumps(asdict(replace(run, pst=run.seeded_pst))))


def flat_table(run: RunConfig) -> dict[str, Any]:
    """Return the settings of ``run`` as JSON values, by their dotted names."""
    return flatten(as_table(run))


def restore(engine: Engine, checkpoint: Checkpoint, run: RunConfig) -> LoopState:
    """Restore the optimizer, and return the state that the loop continues from. Collective.

    The model must have the checkpoint's values already. Raises CheckpointError when its masks are not those saved.
    """
    progress, step = RunProgress.read(checkpoint), checkpoint.state.step
    load_optimizer(engine, checkpoint)
    accumulation = run.train.gradient_accumulation_steps
    set_counters(engine, applied=step, skipped=progress.skipped_steps, accumulation=accumulation)
    masks = progress.loop.masks
    if masks is not None and (checksum := mask_stats(engine.module).checksum) != masks.checksum:
        raise CheckpointError(
            f"{checkpoint.folder}: the masks have checksum {checksum} in the model, and had {masks.checksum} when "
            "they were saved"
        )
    return progress.loop
