"""Modules that are imported when a test first uses them, so that collecting all tests stays fast."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest


class LazyModule:
    """Stands for a module, and imports it when one of its attributes is read.

    Private attributes do not count: pytest asks every object of a test file for some of them.
    """

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        raise AttributeError(f'only this object would have it. Patch the module: "{self._name}.{attribute}"')


def lazy_module(name: str) -> Any:
    """Return a :class:`LazyModule`. Skip the test file where the package of the module is not installed."""
    need_packages(name.partition(".")[0])
    return LazyModule(name)


def need_packages(*names: str) -> None:
    """Skip the test file where one of these packages is not installed, and import none of them."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}, which is not installed", allow_module_level=True)
