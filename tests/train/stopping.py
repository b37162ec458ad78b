"""Stop a run as a signal on one rank does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pst_ds.parallel import stop_signals
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train import loop as loop_module
from pst_ds.train.run import StoppedError


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
