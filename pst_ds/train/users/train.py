"""Train the states of users, one after another over one model that is loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.config.run import ConfigError, DistillationConfig, PicturesConfig, RunConfig
from pst_ds.config.tracking import TrackingConfig
from pst_ds.data.by_user import RowsByUser, read_by_user
from pst_ds.parallel import stop_signals
from pst_ds.parallel.ranks import all_gather_objects, of_main, raise_on_all_ranks, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.progress import Progress
from pst_ds.train.loop import DivergedError, Loop, LoopState
from pst_ds.train.monitor.metrics import MetricsWriter
from pst_ds.train.objective import Objective
from pst_ds.train.run import Prepared, StoppedError
from pst_ds.train.users.lockstep import rounds, train_round
from pst_ds.train.users.personal import PersonalModel, PersonalPart
from pst_ds.train.users.store import State, UserStore, require_name
from pst_ds.train.users.trained import Trained, with_batches_for

_NEVER = 1 << 40
SHARE_BESIDE_A_HEAD = 0.2
"""Of the run's rate of updates, where a user has a head of its own too: at the whole of it updates learn a few rows by
heart that the head alone has the measure of (docs/users.md)."""
SHARE_OF_TOKENS = 0.4
"""The same of a language model, whose few texts of a user are learned by heart at the whole of it (docs/users.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserTraining:
    """How each user's state is trained; the rest is as in the run."""

    epochs: float = 8.0
    batch_size: int = 8
    """Most rows of a step; users with few have all of theirs in steps of equal size."""
    update_learning_rate: float | None = None
    """Of U and V, or of gates. None is the run's, for U and V a share of it: :data:`SHARE_BESIDE_A_HEAD`, or
    :data:`SHARE_OF_TOKENS` in a language model."""
    head_learning_rate: float | None = None
    """None is the run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which users of a column are trained."""

    names: tuple[str, ...] = ()
    """Empty is all."""
    min_rows: int = 1
    limit: int = 0
    """Most users, those with most rows; 0 is all."""

    def of(self, rows: RowsByUser) -> tuple[list[str], list[str]]:
        """Return the chosen users, and those left out for having fewer than ``min_rows`` rows. Raises ConfigError for
        a name that no row has, and if nobody is left."""
        for name in self.names:
            require_name(name)
            if name not in rows.places:
                some = ", ".join(map(repr, list(rows.places)[:6]))
                raise ConfigError(f"--users {name!r}: no row of {rows.where} is of that user; there is {some}, …")
        for name in rows.places:
            require_name(name)
        wanted = self.names or tuple(rows.places)
        few = [name for name in wanted if rows.count(name) < self.min_rows]
        chosen = [name for name in dict.fromkeys(wanted) if rows.count(name) >= self.min_rows]
        if not chosen:
            most = max(rows.count(name) for name in wanted)
            raise ConfigError(
                f"no user of {rows.where} has {self.min_rows} rows, the most are {most}; lower --min-rows"
            )
        if self.limit:
            chosen = sorted(chosen, key=rows.count, reverse=True)[: self.limit]
        return chosen, few


class _Losses(MetricsWriter):
    """Writes nothing, and keeps the loss of the last batch."""

    last = 0.0

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if values.get("losses"):
            self.last = float(values["losses"][-1])


def run_of_users(run: RunConfig, how: UserTraining, **files: str) -> RunConfig:
    """Return ``run`` with what training its users needs; ``files``: in place of those of its splits."""
    if files:
        sources = () if "train" in files else run.data.sources
        run = replace(run, data=replace(run.data, dataset="", sources=sources, **files))  # type: ignore[arg-type]
    train = replace(
        run.train, num_steps=0, num_epochs=how.epochs, batch_size=how.batch_size, gradient_accumulation_steps=1,
        sequence_parallel=1, log_interval=_NEVER,
    )  # fmt: skip
    rates = {name: getattr(how, name) for name in ("update_learning_rate", "head_learning_rate")}
    rates["gate_learning_rate"] = how.update_learning_rate
    train = replace(train, **{name: rate for name, rate in rates.items() if rate is not None})
    return replace(
        run, train=train, dense_run="", distillation=DistillationConfig(), pictures=PicturesConfig(interval=-1),
        tracking=TrackingConfig(),
    )  # fmt: skip


def with_rates_of_users(run: RunConfig, how: UserTraining, *, width: int, steps: int) -> RunConfig:
    """Return ``run``, of :func:`run_of_users`, with the rates that it left open for a model of that width and users of
    so many steps; that of updates is its share where ``how`` names none."""
    seen = steps * run.train.batch_size  # in one pass: embeddings, whose rate falls with more, are nobody's own
    run = run.with_rates(width=width, num_steps=steps, num_examples=seen, num_labels=0)
    rate = run.train.update_learning_rate
    if rate is None or how.update_learning_rate is not None:
        return run
    share = SHARE_OF_TOKENS if run.task_facts.predicts_tokens else SHARE_BESIDE_A_HEAD
    return replace(run, train=replace(run.train, update_learning_rate=share * rate))


def train_users(
    prepared: Prepared,
    checkpoint: Checkpoint,
    folder: Path,
    column: str,
    part: PersonalPart,
    choice: Choice,
    how: UserTraining,
    *,
    again: bool = False,
    user_per_rank: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train the users of ``column`` of the training rows of a run, that of :func:`run_of_users` of ``how``, into the
    store ``folder``; return what was done.

    A user that the store has already is left as it is, unless ``again``. Each state is in the store before the next
    user begins; with ``user_per_rank`` all ranks train another user at a time. Collective. Raises InputError, and
    StoppedError after a signal.
    """
    rows = raise_on_all_ranks(lambda: read_by_user(prepared.run.data, "train", column))
    chosen, few = raise_on_all_ranks(lambda: choice.of(rows))
    steps = _usual_steps(prepared.run, rows, chosen)
    run = with_rates_of_users(prepared.run, how, width=prepared.width, steps=steps)
    prepared = replace(prepared, run=run)
    model = PersonalModel(prepared, checkpoint, part, own_of_rank=user_per_rank)
    of_main(lambda: UserStore.create(folder, model.common).names)
    store = raise_on_all_ranks(lambda: UserStore.open(folder))
    waiting = [name for name in chosen if again or name not in store]
    if len(waiting) < len(chosen):
        say(f"{len(chosen) - len(waiting)} users are in {folder} already; --again trains them anew")
    trained, diverged = 0, []
    one_by_one = ((name, *_alone(model, prepared, rows, name)) for name in waiting)
    with Progress("train users", len(waiting), "users") as progress:
        for name, done, why in _in_rounds(model, prepared, rows, waiting) if user_per_rank else one_by_one:
            if done is None:
                diverged.append(name)
                progress.say(f"{name}: {why}")
                continue
            if done.stopped_by:
                raise _stopped(done.stopped_by, trained, folder)
            of_main(partial(store.add, name, done.state, rows=done.rows, steps=done.steps, loss=done.loss))
            trained += 1
            progress.add(1, name[:40])
            if user_per_rank and (signal := max(all_gather_objects(stop_signals.asked_by()))):
                raise _stopped(signal, trained, folder)
    return {
        "store": str(folder), "users": len(chosen), "trained": trained, "there_already": len(chosen) - len(waiting),
        "with_few_rows": len(few), "diverged": diverged, "state_bytes": _bytes(model.state()),
    }  # fmt: skip


def _stopped(signal: int, trained: int, folder: Path) -> StoppedError:
    return StoppedError(
        f"stopped by {stop_signals.name_of(signal)} after {trained} users, which are in {folder}; start it again to go "
        "on"
    )


def _alone(model: PersonalModel, prepared: Prepared, rows: RowsByUser, name: str) -> tuple[Trained | None, str]:
    """Return what :func:`train_user` does, or None and why."""
    heartbeat("the training of a user")
    try:
        return train_user(model, prepared, rows, name), ""
    except DivergedError as error:
        return None, str(error)


def _in_rounds(
    model: PersonalModel, prepared: Prepared, rows: RowsByUser, names: Sequence[str]
) -> Iterator[tuple[str, Trained | None, str]]:
    """Yield each user with what training it on one of the ranks has made, or None and why."""
    for at_a_time in rounds(names, rows):
        found = train_round(model, prepared, rows, at_a_time)
        for name in at_a_time:
            yield name, found.get(name), "its loss is not finite; lower --learning-rate"


def train_user(model: PersonalModel, prepared: Prepared, rows: RowsByUser, name: str) -> Trained:
    """Train one user from the shared state, so that its state has the same bits whoever was trained before.

    Collective. Raises ConfigError and DivergedError.
    """
    examples = raise_on_all_ranks(lambda: rows.load(prepared.task, name, prepared.tokenizer, prepared.labels))
    model.activate(None)
    run = with_batches_for(prepared.run, len(examples), name, ranks=world_size())
    num_steps = run.num_steps(len(examples))
    metrics = _Losses(Path(run.output_dir), num_steps=num_steps, is_main=False, quiet=True)
    given = (examples, prepared.tokenizer, num_steps, prepared.device, metrics, Objective(run))
    end = LoopState()
    for reached in Loop(run, model.engine, None, *given).steps(end):
        if reached.stopped_by:
            break
    return Trained(model.state(), len(examples), end.step, metrics.last, end.stopped_by)


def _usual_steps(run: RunConfig, rows: RowsByUser, users: Sequence[str]) -> int:
    """Return the steps of a user with the median number of rows, for which default rates are chosen."""
    counts = sorted(rows.count(name) for name in users)
    return max(1, round(run.train.num_epochs * -(-counts[len(counts) // 2] // run.train.batch_size)))


def _bytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())
