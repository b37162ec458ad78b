"""Kernels run in two ways here: in Triton's interpreter, which must be asked for before triton is imported and so has a
process of its own, ``TRITON_INTERPRET=1 pytest -m interpreted tests/kernels``; and compiled, in any other process."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

INTERPRETED_FILES = "test_interpreted_"
MASKED_OPERATIONS = {
    "create_masked_load": "mask",
    "create_masked_store": "mask",
    "create_atomic_rmw": "mask",
    "create_select": "cond",
}
"""Operations of Triton's interpreter, and the name of the parameter that must hold booleans."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not collection_path.name.startswith("test_"):
        return None
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return True if collection_path.name.startswith(INTERPRETED_FILES) != is_interpreted else None


@pytest.fixture(autouse=True)
def _masks_are_boolean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test whose kernels pass anything but booleans as a mask.

    The interpreter keeps a comparison of two scalars as booleans, and turns it into integers when it is broadcast.
    Triton 3.9 rejects such a mask; earlier versions read it.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    for name, parameter in MASKED_OPERATIONS.items():
        operation = getattr(interpreter.InterpreterBuilder, name)
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, _with_boolean(operation, parameter))


def _with_boolean(operation: Callable[..., Any], parameter: str) -> Callable[..., Any]:
    """Return ``operation``, which refuses a ``parameter`` whose values are not booleans."""
    signature = inspect.signature(operation)

    @functools.wraps(operation)
    def checked(*args: Any) -> Any:
        values = signature.bind(*args).arguments[parameter].data
        assert values.dtype == bool, f"{operation.__name__}: {parameter} is {values.dtype}, not bool"
        return operation(*args)

    return checked
