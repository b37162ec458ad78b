"""Base of the settings classes: checked frozen dataclasses, annotated types, and messages for wrong values."""

import difflib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, is_dataclass
from enum import Enum
from functools import wraps
from typing import Annotated, Any, TypeVar, cast, dataclass_transform, get_type_hints

from annotated_types import Ge, Lt
from pydantic import AllowInfNan, ConfigDict, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from pst_ds.core.fractions import percent_hint
from pst_ds.errors import InputError

T = TypeVar("T")
Schema = dict[str, Any]
"""JSON schema of a setting or section."""


class OnResume(Enum):
    """Marks of settings that a resumed run may change. Settings without a mark must keep their values."""

    MAY_DIFFER = "paths, and how the same numbers are computed"
    IS_REPORTED = "settings that a user may change to recover from a divergence; the run reports the change"


class OnLoad(Enum):
    """Marks of settings that may differ between a saved adapter and the model that it is loaded into.

    Settings without a mark are part of the formula: with another value, the same tensors would compute something else.
    """

    SHAPES = "settings that change the names or shapes of the saved tensors, which loading compares"
    BEFORE = "initial values, the choice of masks and how results are computed: no part of what a loaded model computes"


FINITE = AllowInfNan(False)
Positive = Annotated[int, Ge(1)]
NotNegative = Annotated[int, Ge(0)]
Finite = Annotated[float, FINITE]
Rate = Annotated[float, Ge(0.0), FINITE]
Share = Annotated[float, Ge(0.0), Lt(1.0)]
Strings = Annotated[tuple[str, ...], Strict(False)]
"""A tuple of strings. Lists are converted."""
Integers = Annotated[tuple[int, ...], Strict(False)]
"""A tuple of whole numbers. Lists are converted."""
Interval = Annotated[int, Ge(-1)]
"""Optimizer steps between two events. 0 is a default, -1 is never."""
MayDiffer = Annotated[T, OnResume.MAY_DIFFER]
Reported = Annotated[T, OnResume.IS_REPORTED]
InShapes = Annotated[T, OnLoad.SHAPES]
BeforeLoading = Annotated[T, OnLoad.BEFORE]

_OUT_OF_RANGE = {"greater_than_equal", "greater_than", "less_than_equal", "less_than", "finite_number"}
"""Types of pydantic's errors for a number outside of its range."""
_KINDS = {"string": "a string", "integer": "a whole number", "number": "a number", "boolean": "true or false"}
_ITEMS = {"string": "strings", "integer": "whole numbers", "number": "numbers", "boolean": "true or false"}
_WITH_PRESET = ("pst", "data")
"""Sections of a run file that have a ``preset``, which is replaced before they are checked."""


class ConfigError(InputError):
    """Settings of a run file or of ``--set`` that cannot be used; each argument has a name, a value and the fix."""

    def __str__(self) -> str:
        # Python would show several arguments as a tuple of quoted strings.
        if len(self.args) < 2:
            return super().__str__()
        return "\n  ".join([f"{len(self.args)} settings cannot be used:", *map(str, self.args)])


class Section:
    """Base of the sections of a run file. A subclass yields what is wrong with its values from ``problems``."""

    def __post_init__(self) -> None:
        report(self.problems())

    def problems(self) -> Iterator[str]:
        """Yield a message for each broken rule, with full names of settings. Types and ranges hold already."""
        yield from ()

    def unused(self, section: str, reason: str, instead: str, *names: str) -> Iterator[str]:
        """Yield a message for each setting in ``names`` that has no default value, and does nothing for ``reason``.

        ``instead``: how to give it an effect, in the imperative; "" if it cannot have one.
        """
        for name in names:
            value = getattr(self, name)
            # A run folder's run.toml spells out every setting, so a default value is not a user's mistake.
            if value == getattr(type(self), name):
                continue
            alternative = ""
            if instead:
                alternative = f", or {instead}"
            yield f"{section}.{name} = {value!r} does nothing {reason}. Remove {section}.{name}{alternative}"


def report(problems: Iterable[str]) -> None:
    """Raise ConfigError with all ``problems``, if there are any."""
    distinct = list(dict.fromkeys(problems))  # two sections may report the same conflict
    if distinct:
        raise ConfigError(*distinct)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def settings(cls: type[T]) -> type[T]:
    """Decorate a class as a frozen dataclass with keyword arguments only.

    Its constructor checks types and ranges by the annotations, and raises ConfigError with a message for each value.
    """
    # strict: "8" and 8.0 are mistakes where a whole number is expected.
    config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)
    section: Any = dataclass(frozen=True, kw_only=True, config=config)(cls)
    construct = section.__init__

    @wraps(construct)
    def checked(self: T, **values: object) -> None:
        try:
            construct(self, **values)
        except ValidationError as error:
            report(messages(error, section, values))

    # The constructor is replaced because pydantic's errors name its types and locations; ours name settings as users
    # write them.
    section.__init__ = checked
    return cast(type[T], section)


def messages(
    error: ValidationError, kind: type, table: Mapping[str, object], *, in_run_file: bool = False
) -> Iterator[str]:
    """Yield a message for each wrong setting of ``table``, which was to become a ``kind``.

    ``in_run_file``: whether settings are in a run file or in ``--set``, not in Python.
    """
    schema = TypeAdapter(kind).json_schema()
    seen: set[str] = set()
    for problem in error.errors(include_url=False):
        place = _place(schema, table, problem["loc"])
        if problem["type"] == "value_error":
            yield from _broken_rules(problem["ctx"]["error"], place.key)
        elif place.key not in seen:  # pydantic reports a wrong value once for each option of a union
            yield _message(problem["type"], place, in_run_file=in_run_file)
        seen.add(place.key)


@plain_dataclass(frozen=True)
class _Place:
    """A setting that pydantic rejected."""

    key: str
    """Dotted name, such as "train.num_steps"."""
    value: object
    entry: Schema
    """Schema of the setting."""
    known: list[str]
    """Names of the settings of its section."""


def _broken_rules(error: Exception, key: str) -> Iterator[str]:
    """Yield the messages of an ``error`` that the section ``key`` has raised itself."""
    if isinstance(error, ConfigError):  # its messages have full names already
        yield from error.args
        return
    # A section of the library has names without a section, one problem per line. Outside of a run file, key is "".
    for line in str(error).split("\n"):
        yield f"{key}.{line}".lstrip(".")


def _message(error_type: str, place: _Place, *, in_run_file: bool) -> str:
    """Return the message for a setting that is unknown or missing, or whose value has a wrong type or range."""
    key = place.key
    if error_type == "unexpected_keyword_argument":
        near = difflib.get_close_matches(key.rpartition(".")[2], place.known, n=1)
        hint = f"Known keys: {', '.join(place.known)}"
        if near:
            hint = f"Did you mean {near[0]!r}?"
        return f"unknown key '{key}'. {hint}"
    if error_type == "missing":
        where = ""
        if in_run_file:
            where = f" in the run file, or with --set {key}="
        return f"'{key}' is missing. Set it{where}"
    if error_type in _OUT_OF_RANGE:
        return f"{key} = {place.value} must {_range(place.entry)}{_hint_for(place.value, place.entry)}"
    fix = ""
    if in_run_file:
        fix = _as_list(key, place.value, place.entry)
    return f"{key} = {place.value!r} must be {_kind(place.entry)}{fix}"


def _place(schema: Schema, table: object, location: tuple[int | str, ...]) -> _Place:
    """Return the setting at pydantic's ``location`` in ``table``, whose JSON schema is ``schema``."""
    names: list[str] = []
    known: list[str] = []
    entry = schema
    value = table
    for part in location:
        if "properties" in entry:
            known = list(entry["properties"])
            if names and names[-1] in _WITH_PRESET:
                known.append("preset")
            names.append(str(part))
            entry = entry["properties"].get(part, {})
            value = value.get(part) if isinstance(value, Mapping) else None
        elif "$ref" in entry.get("items", {}):
            # The index of a table in a list is not part of the name: users know [[data.sources]] by its key.
            entry = entry["items"]
            value = value[int(part)] if isinstance(value, list | tuple) else None
        else:
            # The other parts say which option of a union failed, or which item of a list.
            break
        if "$ref" in entry:
            # A section's schema is in "$defs", at "#/$defs/NAME".
            entry = schema["$defs"][entry["$ref"].rpartition("/")[2]]
    return _Place(key=".".join(names), value=value, entry=entry, known=known)


def _kind(entry: Schema) -> str:
    """Describe the values that a schema allows, without their range: "a whole number", "one of 'bf16', 'fp32'"."""
    if "enum" in entry:
        return f"one of {', '.join(map(repr, entry['enum']))}"
    if "anyOf" in entry:
        # null is the value of an unset setting, which a run file cannot spell.
        return " or ".join(_kind(option) for option in entry["anyOf"] if option.get("type") != "null")
    if entry["type"] == "array":
        items = entry.get("items", {})
        if "$ref" in items:
            return "a list of tables"
        return f"a list of {_ITEMS.get(items.get('type'), 'values')}"
    return _KINDS.get(entry["type"], "a table")


def _range(entry: Schema) -> str:
    """Describe the range of a number: "be in [0, 1)", "be at least 1", "be a finite number above 0"."""
    entry = entry.get("anyOf", [entry])[0]  # a number, or null
    low = entry.get("minimum")
    above = entry.get("exclusiveMinimum")
    upper = _upper_limit(entry)
    if upper is not None:
        limit, is_included = upper
        if low is None and above is None:
            return f"be at most {limit:g}" if is_included else f"be below {limit:g}"
        start = f"({above:g}" if low is None else f"[{low:g}"
        end = "]" if is_included else ")"
        return f"be in {start}, {limit:g}{end}"
    if entry["type"] == "number":
        if above is not None:
            return f"be a finite number above {above:g}"
        least = "" if low is None else f" of at least {low:g}"
        return f"be a finite number{least}"
    return f"be at least {low}" if low else "not be negative"


def _upper_limit(entry: Schema) -> tuple[float, bool] | None:
    """Return the largest value of a number, and whether it is allowed itself; None without one."""
    for key, is_included in (("maximum", True), ("exclusiveMaximum", False)):
        if key in entry:
            return entry[key], is_included
    return None


def _as_list(key: str, value: object, entry: Schema) -> str:
    """Return a sentence that spells a string as the list that a setting must be; "" for other settings and values.

    Shells remove quotes: ``--set tracking.to=["wandb"]`` arrives as ``[wandb]``, which is not TOML.
    """
    if not isinstance(value, str) or _kind(entry) != "a list of strings":
        return ""
    items: list[str] = []
    for item in value.strip().removeprefix("[").removesuffix("]").split(","):
        bare = item.strip().strip("'\"")
        if bare:  # "a," has one item
            items.append(bare)
    written = json.dumps(items, ensure_ascii=False)  # also TOML
    return f". Set {key} = {written}; in a shell: --set {shlex.quote(f'{key}={written}')}"


def _hint_for(value: object, entry: Schema) -> str:
    """Return a question for a percentage where a schema allows a fraction; "" otherwise."""
    entry = entry.get("anyOf", [entry])[0]  # a number, or null
    is_fraction = 1 in (entry.get("maximum"), entry.get("exclusiveMaximum"))
    if not is_fraction:
        return ""
    return percent_hint(value)


def resume_rules(kind: type, prefix: str = "") -> dict[str, OnResume]:
    """Return the mark of each marked setting of a dataclass and its sections, by dotted name."""
    rules: dict[str, OnResume] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, OnResume)]
        if marks:
            rules[f"{prefix}{name}"] = marks[0]
        elif is_dataclass(hint) and isinstance(hint, type):
            rules |= resume_rules(hint, f"{prefix}{name}.")
    return rules
