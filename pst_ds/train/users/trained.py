"""What came of a user's training, and the batches of one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pst_ds.config.run import ConfigError, RunConfig
from pst_ds.train.users.store import State


@dataclass(frozen=True, slots=True)
class Trained:
    """One user's training, at its end."""

    state: State
    rows: int
    """Examples that the user had."""
    steps: int
    loss: float
    """Of the last batch."""
    stopped_by: int
    """The signal that cut it short; 0 for none."""


def with_batches_for(run: RunConfig, count: int, name: str, *, ranks: int) -> RunConfig:
    """Return the run with batches that leave out as few of ``count`` examples as can be. Raises ConfigError where a
    rank would have none."""
    if count < ranks:
        raise ConfigError(
            f"user {name!r} has examples for {count} of {ranks} ranks; raise --min-rows, or take fewer ranks"
        )
    batches = -(-count // run.train.batch_size)
    while batches > 1 and count // batches < ranks:
        batches -= 1
    return replace(run, train=replace(run.train, batch_size=count // batches))
