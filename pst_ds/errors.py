"""Errors that the user can fix: one message with the place, the value and the fix; exit code 2."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


class InputError(ValueError):
    """Bad input: a setting, a file, a model or a checkpoint that cannot be used."""


class ExportError(InputError):
    """An export that cannot be made, or that does not match its manifest."""


def renamed(message: str, names: Mapping[str, str]) -> str:
    """Return a message about fields of one object with the ``names`` that another place has for them.

    Only ``name = value`` is replaced, as messages name a setting with its value.
    """
    # Not after a full stop: "pst.beta = 1" names the setting of a section already.
    alternatives = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![\w.])({alternatives})(?= = )", lambda match: names[match[1]], message)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without its full stop, or the error's name if it has no text.

    A first line that ends with a colon is completed by the last line, which has the cause.
    """
    return first_line_of(str(error)).rstrip(".") or type(error).__name__


def first_line_of(text: str) -> str:
    """Return the first line of ``text``, completed by the last one if it ends with a colon."""
    lines = text.strip().splitlines() or [""]
    first = lines[0].strip()
    if len(lines) > 1 and first.endswith(":"):
        return f"{first} {lines[-1].strip()}"
    return first


def shortened(names: Sequence[str], most: int = 4) -> str:
    """Join the first ``most`` names with commas, and count the others: "a, b, c, d and 3 more"."""
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def first_problem(error: "ValidationError") -> str:
    """Return the first problem that pydantic found: its place, value and reason."""
    problem = error.errors(include_url=False)[0]
    # A part may be a key of the file, which can be as long as the file.
    place = ".".join(str(part)[:80] for part in problem["loc"]) or "it"
    if problem["type"] == "missing":
        return f"{place!r} is missing"
    return f"{place} = {problem_with_value(problem)}"


def problem_with_value(problem: "ErrorDetails") -> str:
    """Return the value that pydantic rejected, shortened, and its reason, without names of our classes."""
    reason = problem["msg"]
    if problem["type"] == "model_type":  # whose text names the class
        reason = "Input should be an object"
    return f"{problem['input']!r:.80}: {reason}"
