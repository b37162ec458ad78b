"""Tokens per expert: which experts received few or none. Imports no torch, for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MOST_NAMED = 4
"""Modules named in one sentence."""
HARDLY_USED = 0.1
"""Fraction of the mean tokens per expert of a module below which an expert counts as hardly used."""


def hardly_used(tokens: Sequence[int]) -> list[int]:
    """Return the indices of the experts of a module that are :data:`HARDLY_USED`, from the ``tokens`` of each."""
    return [i for i, count in enumerate(tokens) if count * len(tokens) < HARDLY_USED * sum(tokens)]


def unused_experts(tokens: Mapping[str, Sequence[int]], since: str = "") -> str:
    """Return "2 of 8 experts were given no token", ``since`` and their names; "" if all received some.

    ``tokens``: per expert, by the name of the module that contains them.
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
