"""The error of every settings class, and checks of the bounds that a field's annotation states."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from dataclasses import astuple
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, Predicate

from pst_ds.errors import InputError

FINITE = Predicate(math.isfinite)
_COMPARISONS = {Ge: operator.ge, Gt: operator.gt, Le: operator.le, Lt: operator.lt}
Positive = Annotated[int, Ge(1)]
NotNegative = Annotated[int, Ge(0)]
Finite = Annotated[float, FINITE]
Rate = Annotated[float, Ge(0.0), FINITE]
Share = Annotated[float, Ge(0.0), Lt(1.0)]


class ConfigError(InputError):
    """A run file, or a --set, that cannot be used: the key, its value and the fix."""


def require_choice(key: str, value: str, choices: Collection[str]) -> None:
    """Raise ConfigError for a value that is not one of the names of a table."""
    if value not in choices:
        raise ConfigError(f"{key} = {value!r} must be one of {', '.join(map(repr, choices))}")


def check_fields(config: object) -> None:
    """Hold every field of a dataclass against the choices and the bounds of its annotation.

    Raises:
        ValueError: names the field, its value and what it must be.
    """
    kind: Any = type(config)  # which is hashable, whatever its objects are
    for name, hint in _hints(kind).items():
        value = getattr(config, name)
        is_union = get_origin(hint) not in (None, Literal, Annotated, tuple)
        for part in get_args(hint) if is_union else [hint]:
            if get_origin(part) is Literal and value not in get_args(part) and not (is_union and value is None):
                raise ValueError(f"{name} = {value!r} must be one of {', '.join(map(str, get_args(part)))}")
            if get_origin(part) is Annotated and value is not None and not _holds(value, get_args(part)[1:]):
                raise ValueError(f"{name} = {value} must {_wanted(get_args(part)[1:])}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _holds(value: float, bounds: tuple[Any, ...]) -> bool:
    return all(
        math.isfinite(value) if bound == FINITE else _COMPARISONS[type(bound)](value, astuple(bound)[0])
        for bound in bounds
    )


def _wanted(bounds: tuple[object, ...]) -> str:
    """Say the bounds in words: "be in [0, 1)", "be at least 1", "be a finite number above 0"."""
    low = next((f"{b.ge:g}" for b in bounds if isinstance(b, Ge)), None)
    above = next((f"{b.gt:g}" for b in bounds if isinstance(b, Gt)), None)
    high = next((f"{b.le:g}]" if isinstance(b, Le) else f"{b.lt:g})" for b in bounds if isinstance(b, Le | Lt)), None)
    if high is not None:
        return f"be in {f'[{low}' if above is None else f'({above}'}, {high}"
    if FINITE in bounds:
        return "be a finite number" + (f" of at least {low}" if low else f" above {above}" if above else "")
    return "not be negative" if low == "0" else f"be at least {low}"
