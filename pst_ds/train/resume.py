"""Resume a run from a checkpoint: the progress that checkpoints keep, and whether the run may continue from it."""

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self

from pst_ds.checkpoint import retention as checkpoints
from pst_ds.checkpoint.format import Checkpoint, CheckpointError
from pst_ds.checkpoint.mirror import fetch_newer
from pst_ds.checkpoint.restore import base_fingerprint, load_optimizer, same_base
from pst_ds.config.additions import resume_rules_of
from pst_ds.config.model import QuantizationConfig
from pst_ds.config.one_shot import OneShotConfig
from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.config.settings import OnResume, resume_rules
from pst_ds.config.toml import REMOVED, flatten
from pst_ds.config.train import FinetuneConfig
from pst_ds.file_names import CHECKPOINTS, SOLVED
from pst_ds.masks.update import mask_stats
from pst_ds.nn.tables.rounded import round_tables
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.optimizer_state import set_counters
from pst_ds.parallel.ranks import barrier, is_main, of_main, raise_on_all_ranks
from pst_ds.remote_folder import RemoteFolder
from pst_ds.train.loop import LoopState


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Progress of a run, for a checkpoint; the same on every rank and for any number of ranks.

    The random numbers of a step and the order of batches follow from the seed and ``loop.batch``, and learning rates
    from the step, so none of them are saved.
    """

    loop: LoopState
    skipped_steps: int
    seconds: float
    """Seconds of training, over all processes of the run."""
    groups: dict[str, dict[str, object]]
    """Learning rate, peak rate and Adam's betas of each parameter group."""
    best_step: int | None
    best_value: float | None
    """Metric after ``best_step``."""
    evaluated_step: int
    """Step of the last evaluation; -1 before the first."""
    data_digest: str
    """SHA-256 of the training examples."""
    run: dict[str, object]
    """Resolved run file."""
    world_size: int
    zero_stage: int

    def as_json(self) -> dict[str, object]:
        """Return the progress as JSON values, for ``CheckpointState.progress``."""
        # the values of the loop lie flat among the others, as checkpoints have them
        table = self.loop.as_json()
        for field in fields(self):
            if field.name != "loop":
                table[field.name] = getattr(self, field.name)
        return table

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> Self:
        """Read the progress in ``checkpoint``. Raises CheckpointError for missing or unknown fields."""
        values = dict(checkpoint.state.progress)
        of_loop: dict[str, object] = {}
        for name in LoopState().as_json():
            if name in values:
                of_loop[name] = values.pop(name)
        try:
            return cls(loop=LoopState.from_json(checkpoint.state.step, of_loop), **values)
        # a missing or an unknown argument of the two constructors
        except TypeError as error:
            raise CheckpointError(f"{checkpoint.folder} was not written to continue a run: {error}") from None


def checkpoint_to_resume(
    run: RunConfig, data_digest: str, *, quiet: bool, mirror: RemoteFolder | None = None
) -> Checkpoint | None:
    """Return the newest valid checkpoint of the run or its mirror, if it has one. Raises InputError. Collective."""
    folder = Path(run.output_dir) / CHECKPOINTS
    if is_main():
        checkpoints.clean_up(folder)
    # all ranks list the folder next, after the removal of unfinished saves
    barrier()
    checkpoint, problems = checkpoints.newest_valid(folder)
    messages = [f"WARNING: {problem}. It is set aside as {checkpoints.BROKEN}" for problem in problems]
    if mirror is not None:
        step = -1
        if checkpoint is not None:
            step = checkpoint.state.step
        is_newer, not_fetched = fetch_newer(mirror, folder, step)
        messages += [f"WARNING: {problem}. It was not used" for problem in not_fetched]
        problems += not_fetched
        if is_newer:
            checkpoint, _ = checkpoints.newest_valid(folder)
            messages.append(f"fetched the newest checkpoint from {mirror.address}")
    if checkpoint is None and problems:
        raise CheckpointError(
            f"no checkpoint in {folder} is valid: {'; '.join(problems)}. Start over with restart = true"
        )
    if checkpoint is None:
        messages.append(f"nothing was saved in {folder} yet: starting at step 0")
    else:
        # locate_base changes the checkpoint, so every rank calls it; one rank reads the base model's files
        path = raise_on_all_ranks(lambda: locate_base(run, checkpoint))
        fingerprint = of_main(lambda: base_fingerprint(path))
        changed = raise_on_all_ranks(lambda: require_same_run(checkpoint, run, fingerprint, data_digest))
        messages.append(f"resuming from {checkpoint.folder}, after step {checkpoint.state.step}")
        messages += [f"  with {change}" for change in changed]
    if is_main() and not quiet:
        print("\n".join(messages), file=sys.stderr, flush=True)
    return checkpoint


def require_same_run(checkpoint: Checkpoint, run: RunConfig, fingerprint: str, data_digest: str) -> list[str]:
    """Raise ConfigError unless ``run`` is the run of ``checkpoint``; return the permitted changes, as text."""
    progress = RunProgress.read(checkpoint)
    require_base(checkpoint, checkpoint.state.base_path, fingerprint)
    # a checkpoint may be older than these settings
    unset = flatten({"quantization": asdict(QuantizationConfig()), "start": asdict(OneShotConfig())})
    unset |= flatten({"finetune": asdict(FinetuneConfig())})
    unset["schedule.solves"] = 0
    before = unset | flatten(progress.run)
    now = flat_table(run)
    changed: list[str] = []
    # in the order of the run file, in which pst.seed comes after the seed that it may follow: that one is named first
    for key in now | before:
        if before.get(key) != now.get(key):
            changed.append(key)
    rules = resume_rules(RunConfig) | resume_rules_of(run.additions)
    for key in changed:
        if key not in rules and key not in REMOVED:
            raise ConfigError(
                f"{key} = {now.get(key)!r}: the run in {checkpoint.folder} has {before.get(key)!r}, and resuming "
                "cannot change this setting. Use the old value, or start a new run in another output_dir."
            )
    if data_digest != progress.data_digest:
        raise ConfigError(
            f"{run.data.trained_on} differs from the data of the run in {checkpoint.folder}: tokens, labels or "
            "data.document_mask have changed. Restore the old file or setting, or start a new run in another "
            "output_dir."
        )
    reported: list[str] = []
    for key in changed:
        if rules.get(key) is OnResume.IS_REPORTED:
            reported.append(f"{key} = {now[key]!r} (was {before[key]!r})")
    return reported


def locate_base(run: RunConfig, checkpoint: Checkpoint) -> str:
    """Set and return ``checkpoint.state.base_path``: ``model.path``, or after a solve its folder in the run's.

    Raises CheckpointError if that folder is missing.
    """
    saved = checkpoint.state.base_path
    path = run.model.path
    before = checkpoint.state.progress.get("run")
    if run.schedule.solves and isinstance(before, dict) and saved != before["model"]["path"]:
        # only the name of the saved folder counts, since the run folder may have been moved
        path = str(Path(run.output_dir) / SOLVED / Path(saved).name)
        if not Path(path).is_dir():
            raise CheckpointError(f"{path} is missing, and {checkpoint.folder} needs it. Copy the whole run folder")
    checkpoint.state = replace(checkpoint.state, base_path=path)
    return path


def on_base_of(run: RunConfig, checkpoint: Checkpoint | None) -> RunConfig:
    """Return ``run`` with the base model of ``checkpoint``, from which its model is built."""
    if checkpoint is None:
        return run
    return replace(run, model=replace(run.model, path=checkpoint.state.base_path))


def require_base(checkpoint: Checkpoint, path: str, fingerprint: str) -> None:
    """Raise ConfigError unless the model at ``path`` with ``fingerprint`` is the checkpoint's base model."""
    if not same_base(fingerprint, checkpoint.state.base_fingerprint):
        raise ConfigError(
            f"model.path = {path!r} is not the base model that {checkpoint.folder} was trained from (its fingerprint "
            "differs). Set model.path to the folder of that model"
        )


def restore(engine: Engine, checkpoint: Checkpoint, run: RunConfig) -> LoopState:
    """Restore the optimizer, and return the state that the loop continues from. Collective.

    The model must have the checkpoint's values already. Raises CheckpointError if its masks differ from those saved.
    """
    progress = RunProgress.read(checkpoint)
    load_optimizer(engine, checkpoint)
    set_counters(
        engine,
        applied=checkpoint.state.step,
        skipped=progress.skipped_steps,
        accumulation=run.train.gradient_accumulation_steps,
    )
    masks = progress.loop.masks
    if masks is not None:
        # collective; every rank has the same saved masks, so all of them make the call, and all raise
        checksum = mask_stats(engine.module).checksum
        if checksum != masks.checksum:
            raise CheckpointError(
                f"{checkpoint.folder}: the masks have checksum {checksum} in the model, and had {masks.checksum} when "
                "they were saved"
            )
    # quantised embeddings: the parameter has rounded values, which follow from the master just restored
    if checkpoint.state.rounds:
        round_tables(engine.module)
    return progress.loop


def as_table(run: RunConfig) -> dict[str, object]:
    """Return ``run`` as JSON values, with the seed that its factors follow."""
    # through JSON, which turns tuples into the lists that a checkpoint has
    table: dict[str, object] = json.loads(json.dumps(asdict(replace(run, pst=run.seeded_pst))))
    return table


def flat_table(run: RunConfig) -> dict[str, object]:
    """Return the settings of ``run`` as JSON values, by their dotted names."""
    return flatten(as_table(run))
