"""Train the states of users, one after another over one model that is loaded once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.checkpoint.user_store import UserStore, require_name
from pst_ds.config.run import ConfigError, LayerStatisticsConfig, RunConfig, TrackingConfig
from pst_ds.config.train import DistillationConfig
from pst_ds.core.schedule import Schedules
from pst_ds.data.by_user import RowsByUser, read_by_user
from pst_ds.parallel import stop_signals
from pst_ds.parallel.ranks import of_main, raise_on_all_ranks, world_size
from pst_ds.parallel.stop_signals import StoppedError
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.progress import Progress
from pst_ds.train.divergence import DivergedError
from pst_ds.train.loop import Loop, LoopState
from pst_ds.train.monitor.metrics import MetricsWriter
from pst_ds.train.objective import Objective
from pst_ds.train.run_context import RunContext
from pst_ds.train.users.personal import PersonalModel, PersonalPart

_NEVER = 1 << 40
SHARE_BESIDE_A_HEAD = 0.2
"""Share of the run's update rate for users with their own head: at the full rate, updates overfit a few rows that the
head alone could fit (tools/quality/logs/users.md)."""
SHARE_OF_TOKENS = 0.4
"""The same for language models: at the full rate they overfit a user's documents (tools/quality/logs/users.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserTraining:
    """Settings to train each user's state. All other settings come from the run."""

    epochs: float = 8.0
    batch_size: int = 8
    """Most rows per step; the rows of users with few are split into steps of equal size."""
    update_learning_rate: float | None = None
    """Peak rate of U and V. None for a share of the run's: :data:`SHARE_BESIDE_A_HEAD`, or :data:`SHARE_OF_TOKENS` for
    language models."""
    head_learning_rate: float | None = None
    """Peak rate of the head. None for the run's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The users of a column that are trained."""

    names: tuple[str, ...] = ()
    """Names of users; empty for all."""
    min_rows: int = 1
    """Fewest rows of a user that is trained."""
    limit: int = 0
    """Most users, chosen by their number of rows; 0 for no limit."""

    def of(self, rows: RowsByUser) -> tuple[list[str], list[str]]:
        """Return (chosen users, users with fewer than ``min_rows`` rows). Raises ConfigError for a name without rows,
        and if no user is left."""
        for name in self.names:
            require_name(name)
            if name not in rows.places:
                some = ", ".join(map(repr, list(rows.places)[:6]))
                raise ConfigError(f"names = {name!r}: no row of {rows.where} is of that user. Choose from {some}, …")
        for name in rows.places:
            require_name(name)
        wanted = self.names or tuple(rows.places)
        few = [name for name in wanted if rows.count(name) < self.min_rows]
        chosen = [name for name in dict.fromkeys(wanted) if rows.count(name) >= self.min_rows]
        if not chosen:
            most = max(rows.count(name) for name in wanted)
            raise ConfigError(
                f"min_rows = {self.min_rows}: no user of {rows.where} has as many rows, the most are {most}. Lower it."
            )
        if self.limit:
            chosen = sorted(chosen, key=rows.count, reverse=True)[: self.limit]
        return chosen, few


class _Losses(MetricsWriter):
    """Writes nothing and keeps the loss of the last batch."""

    last = 0.0

    def write(self, step: int, values: Mapping[str, object]) -> None:
        losses = values.get("losses")
        if isinstance(losses, list) and losses:
            self.last = float(losses[-1])


def run_of_users(run: RunConfig, how: UserTraining, **files: str) -> RunConfig:
    """Return ``run`` with the settings for training its users. ``files`` replace the files of its splits."""
    if files:
        sources = () if "train" in files else run.data.sources
        run = replace(run, data=replace(run.data, dataset="", sources=sources, **files))  # type: ignore[arg-type]
    train = replace(
        run.train,
        num_steps=0,
        num_epochs=how.epochs,
        batch_size=how.batch_size,
        gradient_accumulation_steps=1,
        sequence_parallel=1,
        log_interval=_NEVER,
        profile=(),
    )
    rates = {name: getattr(how, name) for name in ("update_learning_rate", "head_learning_rate")}
    return replace(
        run,
        train=replace(train, **{name: rate for name, rate in rates.items() if rate is not None}),
        distillation=DistillationConfig(),
        layer_statistics=LayerStatisticsConfig(interval=-1),
        tracking=TrackingConfig(),
    )


def with_rates_of_users(run: RunConfig, how: UserTraining, *, width: int, steps: int) -> RunConfig:
    """Return ``run`` with a number for every rate, for a model of hidden size ``width`` and users of ``steps`` steps.
    The update rate is the share that :class:`UserTraining` describes, unless ``how`` sets one."""
    seen = steps * run.train.batch_size  # only the rate of embeddings depends on it, and no embedding is personal
    run = run.with_rates(width=width, num_steps=steps, num_examples=seen, num_labels=0)
    rate = run.train.update_learning_rate
    if rate is None or how.update_learning_rate is not None:
        return run
    share = SHARE_OF_TOKENS if run.task_facts.predicts_tokens else SHARE_BESIDE_A_HEAD
    return replace(run, train=replace(run.train, update_learning_rate=share * rate))


def train_users(
    context: RunContext,
    checkpoint: Checkpoint,
    folder: Path,
    column: str,
    part: PersonalPart,
    choice: Choice,
    how: UserTraining,
    *,
    again: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, object]:
    """Train the users of a ``column`` of the training rows into the store ``folder``. Collective.

    ``context`` is of the run that :func:`run_of_users` returns for ``how``. Users that the store has are skipped
    unless ``again``. Each state is stored before the next user starts, so an interrupted training resumes. Returns the
    facts about it. Raises InputError, and StoppedError after a signal.
    """
    rows = raise_on_all_ranks(lambda: read_by_user(context.run.data, "train", column))
    chosen, few = raise_on_all_ranks(lambda: choice.of(rows))
    train, counts = context.run.train, sorted(map(rows.count, chosen))
    usual = counts[len(counts) // 2]  # default rates are for the median number of rows
    steps = max(1, round(train.num_epochs * -(-usual // train.batch_size)))
    context = context.with_run(with_rates_of_users(context.run, how, width=context.width, steps=steps))
    model = PersonalModel(context, checkpoint, part)
    of_main(lambda: UserStore.create(folder, model.common).names)
    store = raise_on_all_ranks(lambda: UserStore(folder))
    waiting = [name for name in chosen if again or name not in store]
    if len(waiting) < len(chosen):
        say(f"{len(chosen) - len(waiting)} users are in {folder} already; again = true trains them again")
    trained, diverged = _train_all(model, rows, store, waiting)
    return {
        "store": str(folder),
        "users": len(chosen),
        "trained": trained,
        "there_already": len(chosen) - len(waiting),
        "with_few_rows": len(few),
        "diverged": diverged,
        "state_bytes": sum(tensor.nbytes for tensor in model.state().values()),
    }


def _train_all(model: PersonalModel, rows: RowsByUser, store: UserStore, names: Sequence[str]) -> tuple[int, list[str]]:
    """Train users into ``store``; return (number of trained users, names of diverged ones). Collective."""
    trained, diverged = 0, list[str]()
    with Progress("train users", len(names), "users") as progress:
        for name in names:
            heartbeat("the training of a user")
            try:
                stopped_by = _train_user(model, rows, store, name)
            except DivergedError as error:
                diverged.append(name)
                progress.say(f"{name}: {error}")
                continue
            if stopped_by:
                raise StoppedError(
                    f"stopped by {stop_signals.name_of(stopped_by)} after {trained} users, which are in "
                    f"{store.folder}; start it again to resume"
                )
            trained += 1
            progress.add(1, name[:40])
    return trained, diverged


def _train_user(model: PersonalModel, rows: RowsByUser, store: UserStore, name: str) -> int:
    """Train one user from the shared state and store the result, which does not depend on users trained before.

    Collective. Returns the signal that stopped the training, without storing; 0 for none. Raises ConfigError and
    DivergedError.
    """
    context = model.context
    examples = raise_on_all_ranks(lambda: rows.load(context.task, name, context.tokenizer, context.labels))
    model.activate(None)
    run = _with_batches_for(context.run, len(examples), name)
    context = context.with_run(run)
    metrics = _Losses(Path(run.output_dir), num_steps=run.num_steps(len(examples)), is_main=False, quiet=True)
    state = LoopState()  # changed in place
    for _ in Loop(context, model.engine, examples, Schedules(), metrics, Objective(context)).steps(state):
        if state.stopped_by:
            return state.stopped_by
    of_main(partial(store.add, name, model.state(), rows=len(examples), steps=state.step, loss=metrics.last))
    return 0


def _with_batches_for(run: RunConfig, count: int, name: str) -> RunConfig:
    """Return ``run`` with the batch size that drops fewest of ``count`` examples. Raises ConfigError when there are
    fewer examples than ranks."""
    ranks = world_size()
    if count < ranks:
        raise ConfigError(
            f"user {name!r} has {count} examples for {ranks} ranks. Set min_rows = {ranks}, or use fewer ranks."
        )
    batches = -(-count // run.train.batch_size)
    while batches > 1 and count // batches < ranks:
        batches -= 1
    return replace(run, train=replace(run.train, batch_size=count // batches))
