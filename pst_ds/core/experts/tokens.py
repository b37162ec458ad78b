"""Tokens per expert: which experts received none."""

from collections.abc import Mapping, Sequence

MOST_NAMED = 4
"""Modules named in one sentence."""


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
