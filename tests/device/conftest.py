"""Tests on the pretended device are collected by ``pytest -m device`` (or ``device and ...``) alone: torch takes it for
the machine's from then on, and tests of other kinds in the same process would see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_test = collection_path.name.startswith("test_")
    return True if is_test and not _selects_only_devices(config.getoption("markexpr")) else None


def _selects_only_devices(expression: str) -> bool:
    """Return whether ``-m expression`` selects tests with the mark "device", and none without it."""
    if not expression:
        return False
    selects = Expression.compile(expression).evaluate
    of_devices = [{"device"}, {"device", "zero3"}]
    others = [{mark} for mark in ("zero3", "launcher", "cluster", "interpreted", "thorough", "few")]
    return any(selects(marks.__contains__) for marks in of_devices) and not any(
        selects(marks.__contains__) for marks in [set(), *others]
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that fork come first: the first backward pass starts a thread for the device, which a fork has not.

    This is the order in one process; on several, those that fork have to have theirs (see the Makefile)."""
    items.sort(key=lambda item: not (item.get_closest_marker("device") and item.get_closest_marker("zero3")))


@pytest.fixture
def run_on_device(run_ranks: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """``run_on_device(function, world_size, *args)``: as ``run_ranks``, on ranks with a pretended device each."""
    from .accelerator import with_device

    return lambda function, world_size, *args: run_ranks(with_device, world_size, function, *args)
