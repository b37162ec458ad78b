"""A machine by its name, or from a TOML file of the user's own."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import typing
from pathlib import Path
from typing import Any

from pst_ds.errors import InputError, first_line
from pst_ds.planning.machines import MACHINES, Machine

_HINTS = typing.get_type_hints(Machine)
_FIELDS = {field.name: field for field in dataclasses.fields(Machine)}
_MAY_BE_ZERO = ("latency", "launch_seconds", "instructions", "update_seconds", "capacity", "peak_flops")


def machine_of(name: str) -> Machine:
    """Return the machine that ``--machine`` names: one of :data:`MACHINES`, or a TOML file. Raises InputError."""
    if name in MACHINES:
        return MACHINES[name]
    if not name.endswith(".toml"):
        raise InputError(
            f"--machine {name!r} is not a machine. Choose from {', '.join(MACHINES)}, or name a TOML file with rates "
            "of your own, whose name ends in .toml (docs/how-to/large-models.md)"
        )
    return read_machine(Path(name))


def read_machine(path: Path) -> Machine:
    """Read a Machine, its fields as keys, from a TOML file. Raises InputError with the file, key, value and fix."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InputError(f"--machine {str(path)!r} cannot be read ({reason}); name a TOML file of rates") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        hint = "see docs/how-to/large-models.md for an example"
        raise InputError(f"--machine {path} is not TOML: {first_line(error)}; {hint}") from None
    unknown = next((key for key in table if key not in _FIELDS), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, _FIELDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"leave it out; known keys are {', '.join(_FIELDS)}"
        raise InputError(f"{path}: unknown key {unknown!r} = {table[unknown]!r}: {hint}")
    for name, field in _FIELDS.items():
        if field.default is dataclasses.MISSING and name not in table:
            raise InputError(f"{path}: {name!r} is missing; set it to {_wanted(name)}")
    return Machine(**{key: _checked(path, key, value) for key, value in table.items()})


def _checked(path: Path, key: str, value: Any) -> Any:
    hint, found = _HINTS[key], value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        found = float(value)
    if typing.get_origin(hint) is typing.Literal:
        fits = found in typing.get_args(hint)
    elif hint in (float, int):
        fits = type(found) is hint and math.isfinite(found) and (found > 0 or (found == 0 and key in _MAY_BE_ZERO))
    else:
        fits = type(found) is hint
    if not fits:
        raise InputError(f"{path}: {key} = {value!r} must be {_wanted(key)}")
    return found


def _wanted(key: str) -> str:
    hint = _HINTS[key]
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    kinds = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    least = "" if hint not in (float, int) else " of at least 0" if key in _MAY_BE_ZERO else " above 0"
    return kinds[hint] + least
