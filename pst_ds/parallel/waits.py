"""Where an engine waits for other ranks within a step: for gathered weights, and for reduced gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from pst_ds.parallel.engine import Engine

Timing = Callable[[], AbstractContextManager[None]]
_UNTIMED = "pst_untimed"
P = ParamSpec("P")
R = TypeVar("R")


def time_waits(engine: Engine, timing: Timing) -> None:
    """Let ``engine`` be inside ``timing()``, and no longer what it was told before, whenever it waits for other ranks.

    On a GPU that is what its stream waits for. What DeepSpeed reduces in the middle of a backward pass is not among it,
    but ranks that gather weights there are never far apart.
    """
    fetcher: Any = engine
    for name in ("optimizer", "parameter_offload", "param_coordinator"):
        fetcher = getattr(fetcher, name, None)
    for owner, name in ((fetcher, "fetch_sub_module"), (engine, "allreduce_gradients")):
        if hasattr(owner, name):
            setattr(owner, name, _inside(timing, getattr(owner, name)))


def _inside(timing: Timing, action: Callable[P, R]) -> Callable[P, R]:
    untimed: Callable[P, R] = getattr(action, _UNTIMED, action)

    @wraps(untimed)
    def timed(*args: P.args, **kwargs: P.kwargs) -> R:
        with timing():
            return untimed(*args, **kwargs)

    setattr(timed, _UNTIMED, untimed)
    return timed
