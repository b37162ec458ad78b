"""Kernels run in two ways here: in Triton's interpreter, which must be asked for before triton is imported and so has a
process of its own, ``TRITON_INTERPRET=1 pytest -m interpreted tests/kernels``; and compiled, in any other process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

INTERPRETED_FILES = "test_interpreted_"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not collection_path.name.startswith("test_"):
        return None
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return True if collection_path.name.startswith(INTERPRETED_FILES) != is_interpreted else None
