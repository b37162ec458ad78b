"""Flags of a verb for the settings that messages name: ``bits = 8`` becomes --bits 8.

Messages name settings as Python and run files do. A verb whose flags have other names lists them in ``FLAGS``, and
:func:`in_flags` is the only place that translates.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

_VALUE = r"""(?:"[^"]*"|'[^']*'|\[[^\]]*\]|\([^)]*\)|[\w+-]+(?:[.:/][\w+-]+)*)"""
"""A string, list or tuple, or a word such as 0.5, 2:4 or true; a full stop at its end belongs to the sentence."""
_OTHERS = r"""(?:(?:, | or |, or )["'][^"']*["'])*"""
"""Further values that may be set instead: ``format = "dense", "gguf" or "onnx"``."""


def flags_of_fields(names: Iterable[str]) -> dict[str, str]:
    """Return the flag of each field: "--keep-zeros" for "keep_zeros"."""
    return {name: f"--{name.replace('_', '-')}" for name in names}


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return ``message`` with ``flags`` for the names of settings.

    ``name = value`` becomes ``--flag value``, and ``name = true`` the flag. Without a value only names with a dot, such
    as ``data.label_column``, are replaced: other names could be ordinary words.
    """
    if not flags:
        return message
    # an alternative of a regular expression hides a longer one that starts with it
    longest_first = sorted(flags, key=len, reverse=True)
    names = "|".join(map(re.escape, longest_first))
    pattern = re.compile(
        rf"(?<![\w.\-/])(?P<name>{names})(?:(?P<is> = )(?P<value>{_VALUE})(?P<others>{_OTHERS}))?(?![\w])"
    )

    return pattern.sub(lambda match: _replacement(match, flags), message)


def _replacement(match: re.Match[str], flags: Mapping[str, str]) -> str:
    """Return what replaces a match of :func:`in_flags`: the flag with its value, or the match itself."""
    name = match["name"]
    value = match["value"]
    flag = flags[name]
    if value is None:
        return flag if "." in name else match[0]
    # a flag without a value; None is how messages say that a setting is missing
    if value in ("true", "True", "None"):
        return flag
    others = re.sub(_VALUE, lambda other: _word(other[0]), match["others"])
    return f"{flag} {_word(value)}{others}"


def _word(text: str) -> str:
    """Return the word of a command line for a value as Python or TOML write it; "or" stays itself."""
    if text[0] in "[(":
        # options take lists with commas
        return shlex.quote(",".join(map(str, _items(text))))
    if text[0] in "\"'":
        return shlex.quote(text[1:-1])
    return text


def _items(text: str) -> list[Any]:
    """Return the items of a list or tuple as Python or TOML write it; its text as one item if it cannot be read."""
    # JSON has neither a comma at the end, as in (1,), nor single quotes
    inner = text[1:-1].strip().rstrip(",").replace("'", '"')
    try:
        return list(json.loads(f"[{inner}]"))
    except json.JSONDecodeError:
        # such as an item with a quote in it: a message that shows it unchanged is better than none
        return [inner]
