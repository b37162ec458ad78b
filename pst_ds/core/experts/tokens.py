"""Tokens per expert: which experts received none."""

from collections.abc import Mapping, Sequence

MOST_NAMED = 4
"""Modules named in one sentence."""


def unused_experts(tokens: Mapping[str, Sequence[int]], since: str = "") -> str:
    """Return "2 of 8 experts were given no token", ``since`` and their names; "" if all received some.

    ``tokens``: per expert, by the name of the module that contains them.
    """
    unused: dict[str, list[int]] = {}
    num_experts = 0
    for name, counts in tokens.items():
        num_experts += len(counts)
        experts = [expert for expert, count in enumerate(counts) if not count]
        if experts:
            unused[name] = experts
    if not unused:
        return ""
    # A model has dozens of modules, and one line should say it.
    named: list[str] = []
    for name, experts in list(unused.items())[:MOST_NAMED]:
        named.append(f"{name}: {', '.join(map(str, experts))}")
    if len(unused) > MOST_NAMED:
        named.append(f"and in {len(unused) - MOST_NAMED} more modules")
    num_unused = sum(map(len, unused.values()))
    return f"{num_unused} of {num_experts} experts were given no token{since} ({'; '.join(named)})"
