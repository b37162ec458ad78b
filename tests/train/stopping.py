"""Train a run of a run file, whole or until it is stopped as a signal on one rank does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from pst_ds.config.toml import load_run
from pst_ds.parallel import stop_signals
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train import loop as loop_module
from pst_ds.train.run import StoppedError, TrainResult, prepare, train_prepared


@contextmanager
def stopping(at: int) -> Iterator[pytest.ExceptionInfo[StoppedError]]:
    """Ask the last rank to stop before batch ``at`` of the run in the block, which must stop; yield its error."""
    set_rates, batches = loop_module.set_rates, 0

    def before_batch(*arguments):
        nonlocal batches
        batches += 1
        if batches == at and rank() == world_size() - 1:
            stop_signals._asked_by = 10
        set_rates(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop_signals, "_asked_by", 0)
        patch.setattr(loop_module, "set_rates", before_batch)
        with pytest.raises(StoppedError) as caught:
            yield caught


def train_here(
    run_file: str, settings: Sequence[str], *, resume: bool = False, stop_at: int = 0, ranks: bool = False
) -> TrainResult | None:
    """Train the run of ``run_file`` with ``settings`` laid over it, on the ranks that call it; None if it is stopped.

    Args:
        stop_at: batch before which the last rank is asked to stop; 0 trains to the end.
        ranks: use the DeepSpeed config of the file; otherwise one process without DeepSpeed trains.
    """
    if not ranks:
        settings = [*settings, "deepspeed_config="]
    run = load_run(run_file, settings)
    prepared = prepare(run, LaunchEnvironment(rank(), world_size(), rank()))
    if not stop_at:
        return train_prepared(prepared, resume=resume, quiet=True)
    with stopping(stop_at):
        train_prepared(prepared, resume=resume, quiet=True)
    return None
