"""The error of a run file that cannot be used."""

from __future__ import annotations

from typing import Any

from pst_ds.errors import InputError


class ConfigError(InputError):
    """A run file, or a --set, that cannot be used: the key, its value and the fix."""


def require_positive(name: str, value: Any) -> None:
    """Raise ConfigError for a ``value`` below 1 of the setting ``name``."""
    if value < 1:
        raise ConfigError(f"{name} = {value} must be at least 1")
