"""Time that an engine waits for other ranks within a step: for gathered weights, and for reduced gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps

from pst_ds.parallel import zero3
from pst_ds.parallel.engine import Engine, LocalEngine
from pst_ds.third_party import Code, patch, require

Timing = Callable[[], AbstractContextManager[None]]
_UNTIMED = "pst_untimed"


def time_waits(engine: Engine, timing: Timing) -> None:
    """Make ``engine`` enter ``timing()`` whenever it waits for other ranks, instead of an earlier call's.

    On a GPU that is the time for which its stream waits. It excludes gradients that DeepSpeed reduces within a backward
    pass, but ranks that gather weights there are never far apart. Raises ThirdPartyError.
    """
    if isinstance(engine, LocalEngine):
        return

    def timed(action: Code) -> Code:
        untimed: Code = getattr(action, _UNTIMED, action)

        @wraps(untimed)
        def within(*args: object, **kwargs: object) -> object:
            with timing():
                return untimed(*args, **kwargs)

        setattr(within, _UNTIMED, untimed)
        return within

    patch(engine, "allreduce_gradients", timed)
    if any(map(zero3.is_partitioned, engine.module.parameters())):
        offload = require(engine.optimizer, "parameter_offload")
        patch(require(offload, "param_coordinator"), "fetch_sub_module", timed)
