"""Trained modules next to a model's layers: their registry, and their tables ``[additions.NAME]`` in a run file."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, TypeAdapter, ValidationError, create_model

from pst_ds.config.settings import (
    ConfigError,
    OnResume,
    Rate,
    Reported,
    Section,
    messages,
    report,
    resume_rules,
    settings,
)
from pst_ds.errors import InputError
from pst_ds.plugins import Registry

SECTION = "additions"
"""The table of a run file with a table for each addition."""
ADDITIONS: Registry[Any] = Registry("pst_ds.additions", "addition", {"prompt": "pst_ds.additions.prompt:Prompt"})
"""Subclasses of :class:`pst_ds.nn.addition.ModelAddition`. They import torch, without which run files are read."""


@settings
class AdditionSettings(Section):
    """Settings of any addition. An addition with more of them derives its own class."""

    learning_rate: Reported[Rate] = 5e-3
    """Peak learning rate of the addition's parameters."""


def conflicts_of(additions: Mapping[str, AdditionSettings], run: object) -> Iterator[str]:
    """Yield a message for each setting of ``run``, a RunConfig, that does not fit one of its ``additions``."""
    for name, own_settings in additions.items():
        # An addition is made of its settings without a model, so its rules need no weights.
        addition = ADDITIONS.get(name)(name, own_settings)
        yield from addition.conflicts(run)


def _read_tables(tables: object) -> object:
    """Replace the table of each addition by its settings. Raises ConfigError.

    Anything but a table of tables is returned unchanged, and refused by the type of the setting.
    """
    if not isinstance(tables, Mapping):
        return tables
    return {name: read_settings(name, table) for name, table in tables.items()}


def read_settings(name: str, table: object) -> AdditionSettings:
    """Return the settings of the addition called ``name``, made of its ``table``. Raises ConfigError."""
    try:
        kind: type[AdditionSettings] = ADDITIONS.get(name).settings_class
    except InputError as error:
        raise ConfigError(f"{SECTION}.{name}: {error}") from None
    if isinstance(table, AdditionSettings):
        if not isinstance(table, kind):
            raise ConfigError(f"{SECTION}.{name} = {table!r} must be a {kind.__name__}")
        return table
    # The class of the settings is known only now. Nesting it in a model of a run file lets messages name its settings
    # by their place there.
    section = create_model(SECTION, **{name: (kind, ...)})  # type: ignore[call-overload]
    run = create_model("run", **{SECTION: (section, ...)})  # type: ignore[call-overload]
    whole = {SECTION: {name: table}}
    try:
        # As in toml.py: in JSON, a strict pydantic takes lists for tuples.
        checked = TypeAdapter(run).validate_json(json.dumps(whole))
    except ValidationError as error:
        report(messages(error, run, whole, in_run_file=True))
        raise  # if there is no message for the error, the error itself
    own_settings: AdditionSettings = getattr(getattr(checked, SECTION), name)
    return own_settings


Additions = Annotated[dict[str, SerializeAsAny[AdditionSettings]], BeforeValidator(_read_tables)]
"""The settings of each addition of a run, by the addition's name. Tables are converted."""


def resume_rules_of(additions: Mapping[str, AdditionSettings]) -> dict[str, OnResume]:
    """Return the mark of each marked setting of the ``additions`` of a run, by dotted name."""
    rules: dict[str, OnResume] = {}
    for name, own_settings in additions.items():
        rules |= resume_rules(type(own_settings), f"{SECTION}.{name}.")
    return rules
