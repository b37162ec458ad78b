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
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def lazy_module(name: str) -> Any:
    """Return a :class:`LazyModule`. Skip the test file where the package of the module is not installed."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}, which is not installed", allow_module_level=True)
    return LazyModule(name)
