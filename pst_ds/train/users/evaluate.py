"""Compare each user's state with the shared state and with other users' states."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean

import numpy as np

from pst_ds.checkpoint.user_store import UserStore
from pst_ds.data.by_user import RowsByUser
from pst_ds.data.tasks import ExampleSet
from pst_ds.parallel.ranks import raise_on_all_ranks
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.progress import Progress
from pst_ds.train.evaluate import predict
from pst_ds.train.run_context import RunContext
from pst_ds.train.users.personal import PersonalModel


@dataclass(frozen=True, slots=True)
class UserScores:
    """Metric on one user's rows, with the shared, the user's own and other users' states."""

    user: str
    rows: int
    shared: float
    own: float
    others: tuple[float, ...]
    """Metric with the states of the users that follow by name, cyclically."""

    @property
    def other(self) -> float:
        """Mean over ``others``; NaN for none."""
        return fmean(self.others) if self.others else math.nan

    def as_table(self) -> dict[str, object]:
        """Return the scores as JSON values."""
        return {**asdict(self), "others": list(self.others), "other": self.other}


def evaluate_users(
    model: PersonalModel, store: UserStore, rows: RowsByUser, users: Sequence[str], *, others: int = 1
) -> list[UserScores]:
    """Score each of ``users`` on its rows with the shared state, its own, and up to ``others`` other users' states.
    Collective. Raises InputError."""
    scores = []
    names = store.names
    context = model.context
    with Progress("evaluate users", len(users), "users") as progress:
        for user in users:
            heartbeat("the evaluation of users")
            load = partial(rows.load, context.task, user, context.tokenizer, context.labels)
            examples = raise_on_all_ranks(load)
            following = names.index(user) + 1
            followers = [*names[following:], *names[: following - 1]][:others]
            model.activate(None)
            shared = _score(model, examples)
            by_state = []
            for name in (user, *followers):
                model.activate(store.state(name))
                by_state.append(_score(model, examples))
            scores.append(
                UserScores(user, rows=len(examples), shared=shared, own=by_state[0], others=tuple(by_state[1:]))
            )
            progress.add(1)
    model.activate(None)
    return scores


def metric_of(context: RunContext) -> str:
    """Return the metric that compares states: the run's, or the loss of a language model."""
    return "loss" if context.task.lower_is_better else context.run.metric


def summary(scores: Sequence[UserScores], *, lower_is_better: bool) -> dict[str, float]:
    """Return means over users, and the gain of the own state with its standard error over users."""
    sign = -1.0 if lower_is_better else 1.0
    facts: dict[str, float] = {"users": len(scores), "rows": sum(score.rows for score in scores)}
    for name in ("shared", "own", "other"):
        facts[name] = fmean([getattr(score, name) for score in scores])
    for name in ("shared", "other"):
        gains = [sign * (score.own - getattr(score, name)) for score in scores]
        facts[f"gain_over_{name}"] = fmean(gains)
        spread = math.nan  # of one user; numpy would warn of a division by 0
        if len(gains) > 1:
            spread = float(np.std(gains, ddof=1))
        facts[f"gain_over_{name}_standard_error"] = spread / math.sqrt(len(gains))
        facts[f"share_better_than_{name}"] = fmean([float(gain > 0.0) for gain in gains])
        facts[f"share_worse_than_{name}"] = fmean([float(gain < 0.0) for gain in gains])
    return facts


def _score(model: PersonalModel, examples: ExampleSet) -> float:
    model.engine.eval()
    outcomes = predict(model.engine, model.context, examples)
    with warnings.catch_warnings():  # about metrics that need two classes, for a user with rows of one class
        warnings.simplefilter("ignore")
        return float(model.context.task.metrics(outcomes, examples)[metric_of(model.context)])
