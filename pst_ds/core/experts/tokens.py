"""How many tokens each expert was given, which were given few, or none, and its share of zeros. Imports nothing:
reports need no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MOST_NAMED = 4
"""Modules that a sentence names with their experts."""
HARDLY_USED = 0.1
"""Share of the mean tokens of its module below which an expert was hardly used."""


def hardly_used(tokens: Sequence[int]) -> list[int]:
    """Return the numbers of the experts of a module that were :data:`HARDLY_USED`, from the ``tokens`` of each."""
    return [i for i, count in enumerate(tokens) if count * len(tokens) < HARDLY_USED * sum(tokens)]


def unused_experts(tokens: Mapping[str, Sequence[int]], since: str = "") -> str:
    """Return "2 of 8 experts were given no token", with ``since`` after it, and their names; "" if all had some.

    ``tokens``: of each expert, by the name of the module that holds them.
    """
    found = {name: [i for i, count in enumerate(counts) if not count] for name, counts in tokens.items()}
    unused = {name: numbers for name, numbers in found.items() if numbers}
    if not unused:
        return ""
    named = [f"{name}: {', '.join(map(str, numbers))}" for name, numbers in list(unused.items())[:MOST_NAMED]]
    if len(unused) > MOST_NAMED:
        named.append(f"and in {len(unused) - MOST_NAMED} more modules")
    without, number = (sum(map(len, values.values())) for values in (unused, tokens))
    return f"{without} of {number} experts were given no token{since} ({'; '.join(named)})"


def of_equal_numbers(counts: Mapping[str, Sequence[int]]) -> list[dict[str, Sequence[int]]]:
    """Split numbers of each expert, by module or stack, into tables of as many experts, each in their order."""
    tables: dict[int, dict[str, Sequence[int]]] = {}
    for name, row in counts.items():
        tables.setdefault(len(row), {})[name] = row
    return list(tables.values())


def shares_of_zeros(zeros: Sequence[int], weights: int) -> list[float]:
    """Return the share of zeros in each expert of a stack that has so many ``weights``, from the ``zeros`` of each."""
    return [count * len(zeros) / weights for count in zeros]
