"""JSON as every reader takes it: Python's own has NaN and Infinity, which standard JSON lacks."""

import json
import math
from typing import TypeAlias

JsonObject: TypeAlias = dict[str, "JSON"]
JSON: TypeAlias = JsonObject | list["JSON"] | str | int | float | bool | None
"""Result of ``json.loads``, for code that reads it. Code that only writes takes ``Mapping[str, object]``."""


def json_of(value: object, *, indent: int | None = None) -> str:
    """Return ``value`` as JSON, with null for numbers that are not finite."""
    # Nearly all values are finite, and searching them in Python is slower than a second attempt for the others.
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    """Return a copy of ``value`` with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
