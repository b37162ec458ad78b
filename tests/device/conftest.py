"""Tests on the pretended device are collected by ``pytest -m device`` alone: torch takes it for the machine's from then
on, and tests of other kinds in the same process would see it."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_test = collection_path.name.startswith("test_")
    return True if is_test and config.getoption("markexpr") != "device" else None
