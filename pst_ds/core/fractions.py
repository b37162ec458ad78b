"""Fractions between 0 and 1 in messages: whether a number that is out of range was meant in per cent."""

_LEAST_PERCENTAGE = 5
"""Smaller numbers, such as 1.2, are rather slips of the keyboard: nobody prunes two per cent."""


def percent_hint(value: object) -> str:
    """Return a sentence that asks whether ``value`` is a percentage, such as 90 for 0.9; "" if it cannot be one."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not _LEAST_PERCENTAGE <= value < 100:
        return ""
    return f". Did you mean {value / 100:.6g}?"
