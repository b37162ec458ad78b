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
    longest_first = sorted(flags, key=len, reverse=True)
    names = "|".join(map(re.escape, longest_first))
    pattern = re.compile(
        rf"(?<![\w.\-/])(?P<name>{names})(?:(?P<is> = )(?P<value>{_VALUE})(?P<others>{_OTHERS}))?(?![\w])"
    )

    def flag_of(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if value is None:
            return flags[name] if "." in name else match[0]
        if value in ("true", "True", "None"):
            return flags[name]
        return f"{flags[name]} {_word(value)}{re.sub(_VALUE, lambda other: _word(other[0]), match['others'])}"

    return pattern.sub(flag_of, message)


def _word(text: str) -> str:
    """Return the word of a command line for a value as Python or TOML write it; "or" stays itself."""
    if text[0] in "[(":
        return shlex.quote(",".join(str(item) for item in _items(text)))
    return shlex.quote(text[1:-1]) if text[0] in "\"'" else text


def _items(text: str) -> list[Any]:
    inner = text[1:-1].strip().rstrip(",").replace("'", '"')
    try:
        return list(json.loads(f"[{inner}]"))
    except json.JSONDecodeError:
        return [inner]
