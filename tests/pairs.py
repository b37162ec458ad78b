"""Pairwise cases: a product of many parameters is too long to run, and most faults need two particular values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from _pytest.mark.structures import Mark, ParameterSet

Test = TypeVar("Test", bound=Callable[..., Any])
Case = tuple[int, ...]
"""A case of a product: the position of its value in each parametrization."""


@dataclass(frozen=True)
class Parametrization:
    """One ``pytest.mark.parametrize``."""

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    """Values of all names, for each entry."""
    ids: tuple[str, ...]
    marks: tuple[tuple[Any, ...], ...]
    indirect: tuple[str, ...]
    """Names whose values are passed to fixtures."""


def every_pair(test: Test) -> Test:
    """Run the cases of stacked ``parametrize`` decorators that together have every pair of their values.

    `make test` runs those of them that together have every value; the others are ``thorough``. All cases run where
    there are two decorators. Names of cases are those that pytest gives to the product. This is the outermost
    decorator, so that it sees the others; a test that is ``few`` chooses the cases of `make test` by that mark.
    """
    marks: list[Mark] = list(getattr(test, "pytestmark", []))
    parametrizations = [_parametrization(mark) for mark in marks if mark.name == "parametrize"]
    assert len(parametrizations) > 1, f"{test.__name__}: @every_pair needs two parametrize decorators below it"

    product = list(itertools.product(*(range(len(one.ids)) for one in parametrizations)))
    pairs = set(covering(product, 2))
    is_few = any(mark.name == "few" for mark in marks)
    quick = pairs if is_few else set(covering(product, 1))
    entries = []
    for case in product:  # cases run in the order that pytest gives to the product
        if case in pairs or case in quick:
            entries.append(_entry(parametrizations, case, is_thorough=case not in quick))

    test.pytestmark = [mark for mark in marks if mark.name != "parametrize"]  # type: ignore[attr-defined]
    names = [name for one in parametrizations for name in one.names]
    indirect = [name for one in parametrizations for name in one.indirect]
    return pytest.mark.parametrize(names, entries, indirect=indirect)(test)


def covering(cases: Sequence[Case], number: int) -> list[Case]:
    """Choose cases that have the values of any ``number`` parametrizations in every combination that ``cases`` have.

    The choice is greedy and always the same. Returns ``cases`` where they have no more parametrizations than that.
    """
    if len(cases[0]) <= number:
        return list(cases)
    combinations = {case: set(itertools.combinations(enumerate(case), number)) for case in cases}
    missing = set[tuple[tuple[int, int], ...]]().union(*combinations.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(combinations[case] & missing))
        chosen.append(best)
        missing -= combinations[best]
    return chosen


def _entry(parametrizations: Iterable[Parametrization], case: Case, *, is_thorough: bool) -> ParameterSet:
    """Return one case as an entry of ``parametrize``."""
    values: list[Any] = []
    ids: list[str] = []
    marks: list[Any] = [pytest.mark.thorough] if is_thorough else []
    for one, position in zip(parametrizations, case, strict=True):
        values += one.values[position]
        ids.append(one.ids[position])
        marks += one.marks[position]
    return pytest.param(*values, id="-".join(ids), marks=marks)


def _parametrization(mark: Mark) -> Parametrization:
    """Read a ``parametrize`` mark as pytest does."""
    names_argument, entries = mark.args
    if isinstance(names_argument, str):
        names = tuple(name.strip() for name in names_argument.split(","))
    else:
        names = tuple(names_argument)
    sets = [ParameterSet.extract_from(entry, force_tuple=len(names) == 1) for entry in entries]

    ids_argument = mark.kwargs.get("ids")
    if ids_argument is not None and not callable(ids_argument):
        ids_argument = list(ids_argument)  # also the keys of a dict
    ids = []
    for position, entry in enumerate(sets):
        if entry.id is not None:
            ids.append(str(entry.id))
        elif ids_argument is None or callable(ids_argument):
            words = zip(names, entry.values, strict=True)
            ids.append("-".join(_word(name, value, position, ids_argument) for name, value in words))
        else:
            ids.append(str(ids_argument[position]))

    indirect = mark.kwargs.get("indirect", False)
    if isinstance(indirect, bool):
        indirect = names if indirect else ()
    return Parametrization(
        names=names,
        values=tuple(tuple(entry.values) for entry in sets),
        ids=tuple(ids),
        marks=tuple(tuple(entry.marks) for entry in sets),
        indirect=tuple(indirect),
    )


def _word(name: str, value: object, position: int, make_id: Callable[[Any], object] | None) -> str:
    """Return what represents ``value`` in the name of a case."""
    made = make_id(value) if make_id else None
    shown = value if made is None else made
    if isinstance(shown, str):
        return shown
    if isinstance(shown, bytes):
        return shown.decode("ascii", "backslashreplace")
    if shown is None or isinstance(shown, int | float | complex):
        return str(shown)
    # the name of a class or a function; a value that has none is numbered
    return str(getattr(shown, "__name__", f"{name}{position}"))
