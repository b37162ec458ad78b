"""Base of the settings classes: checked frozen dataclasses, annotated types, and messages for wrong values."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from enum import Enum
from functools import cache, wraps
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AllowInfNan, ConfigDict, Strict, ValidationError
from pydantic.dataclasses import dataclass

from pst_ds.errors import InputError

T = TypeVar("T")


class OnResume(Enum):
    """What a resumed run may change, declared on the setting. Settings without a mark must keep their values."""

    MAY_DIFFER = "paths, and how the same numbers are computed"
    IS_REPORTED = "settings that a user may change to recover from a divergence; the run reports the change"


FINITE = AllowInfNan(False)
Positive = Annotated[int, Ge(1)]
NotNegative = Annotated[int, Ge(0)]
Finite = Annotated[float, FINITE]
Rate = Annotated[float, Ge(0.0), FINITE]
Share = Annotated[float, Ge(0.0), Lt(1.0)]
Strings = Annotated[tuple[str, ...], Strict(False)]
"""A tuple of strings. Lists are converted."""
Interval = Annotated[int, Ge(-1)]
"""Optimizer steps between two events. 0 is a default, -1 is never."""
MayDiffer = Annotated[T, OnResume.MAY_DIFFER]
Reported = Annotated[T, OnResume.IS_REPORTED]

_CONFIG = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)
_OUT_OF_RANGE = {"greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number"}
_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
_WITH_PRESET = ("pst", "data")
"""Sections of a run file that have a ``preset``, which is replaced before they are checked."""


class ConfigError(InputError):
    """Settings of a run file or of ``--set`` that cannot be used; each argument has a name, a value and the fix."""

    def __str__(self) -> str:
        if len(self.args) < 2:
            return super().__str__()
        return "\n  ".join([f"{len(self.args)} settings cannot be used:", *map(str, self.args)])


class Section:
    """Base of the sections of a run file. A subclass yields what is wrong with its values from ``problems``."""

    __slots__ = ()

    def __post_init__(self) -> None:
        report(self.problems())

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule, with full names of settings. Types and ranges hold already."""
        yield from ()


def report(problems: Iterable[str]) -> None:
    """Raise ConfigError with all ``problems``, if there are any."""
    if found := list(dict.fromkeys(problems)):
        raise ConfigError(*found)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def settings(*, slots: bool = True) -> Callable[[type[T]], type[T]]:
    """Decorate a class as a frozen dataclass with keyword arguments only.

    Its constructor checks types and ranges by the annotations, and raises ConfigError with a message for each value.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = dataclass(frozen=True, kw_only=True, slots=slots, config=_CONFIG)(cls)
        construct = made.__init__

        @wraps(construct)
        def checked(self: T, **values: object) -> None:
            try:
                construct(self, **values)
            except ValidationError as error:
                report(messages(error, made, values))

        made.__init__ = checked
        return cast(type[T], made)

    return decorate


def messages(error: ValidationError, kind: type, table: Mapping[str, object]) -> Iterator[str]:
    """Yield a message for each wrong setting of ``table``, which was to become a ``kind``."""
    seen = set()
    for problem in error.errors(include_url=False):
        place = _Place(kind, table, problem["loc"])
        if place.key in seen:  # one of several options of a union
            continue
        if problem["type"] == "value_error":
            wrong = problem["ctx"]["error"]
            if isinstance(wrong, ConfigError):
                yield from wrong.args
            else:
                yield from (f"{place.key}.{line}".lstrip(".") for line in str(wrong).split("\n"))
            continue
        seen.add(place.key)
        if problem["type"] == "unexpected_keyword_argument":
            near = difflib.get_close_matches(place.name, place.known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(place.known)}"
            yield f"unknown key '{place.key}'. {hint}"
        elif problem["type"] == "missing":
            yield f"'{place.key}' is missing. Set it in the run file, or with --set {place.key}="
        elif problem["type"] in _OUT_OF_RANGE:
            yield f"{place.key} = {place.value} must {_range(place.hint)}"
        else:
            yield f"{place.key} = {place.value!r} must be {_describe(place.hint)}"


class _Place:
    """The setting at ``location`` of a validation error: dotted key, annotation, value, and names next to it."""

    def __init__(self, kind: type, table: object, location: tuple[int | str, ...]):
        names: list[str] = []
        self.hint: Any = kind
        self.value, self.known = table, list[str]()
        for part in location:
            section = _section_in(self.hint)
            if section is None:  # the rest says which option of a union failed, or which item of a list
                break
            if isinstance(part, int):
                self.value = self.value[part] if isinstance(self.value, list | tuple) else None
                self.hint = section
                continue
            preset = ["preset"] if names and names[-1] in _WITH_PRESET else []
            self.known = [*(field.name for field in fields(section)), *preset]
            names.append(part)
            self.hint = hints(section).get(part)
            self.value = self.value.get(part) if isinstance(self.value, Mapping) else None
        self.key, self.name = ".".join(names), names[-1] if names else ""


@cache
def hints(kind: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass with their metadata, by field."""
    return get_type_hints(kind, include_extras=True)


def resume_rules(kind: Any, prefix: str = "") -> dict[str, OnResume]:
    """Return the mark of each marked setting of a dataclass and its sections, by dotted name."""
    rules = {}
    for name, hint in hints(kind).items():
        marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, OnResume)]
        if marks:
            rules[f"{prefix}{name}"] = marks[0]
        elif is_dataclass(hint):
            rules |= resume_rules(hint, f"{prefix}{name}.")
    return rules


def _section_in(hint: Any) -> Any:
    """Return the dataclass that a value of ``hint`` is, or whose instances it lists; None for other values."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Annotated, tuple):
        return _section_in(args[0])
    return hint if is_dataclass(hint) else None


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _describe(args[0])
    if origin in (Union, UnionType):
        return " or ".join(_describe(option) for option in args if option is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple:
        return "a list of tables" if is_dataclass(args[0]) else "a list of strings"
    return "a table" if is_dataclass(hint) else _KINDS.get(hint, str(hint))


def _range(hint: Any) -> str:
    """Describe the range of a number: "be in [0, 1)", "be at least 1", "be a finite number above 0"."""
    bounds = _bounds(hint)
    low = next((f"{b.ge:g}" for b in bounds if isinstance(b, Ge)), None)
    above = next((f"{b.gt:g}" for b in bounds if isinstance(b, Gt)), None)
    high = next((f"{b.le:g}]" if isinstance(b, Le) else f"{b.lt:g})" for b in bounds if isinstance(b, Le | Lt)), None)
    if high is not None:
        return f"be in {f'[{low}' if above is None else f'({above}'}, {high}"
    if FINITE in bounds:
        return "be a finite number" + (f" of at least {low}" if low else f" above {above}" if above else "")
    return "not be negative" if low == "0" else f"be at least {low}"


def _bounds(hint: Any) -> list[Any]:
    """Return the metadata of an annotation, and of the options of a union in it."""
    found = list(getattr(hint, "__metadata__", ()))
    inner = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    return found + [bound for option in inner for bound in _bounds(option)]
