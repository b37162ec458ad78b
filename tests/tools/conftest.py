"""Benchmarks as forks of this process, and their ranks too: an interpreter takes longer to start than what they do."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.forks import ForkedModule
from tools.bench import ranks

FOLDER = Path(__file__).parent
GUARANTEES = ("test_examples.py", "test_example_runs.py", "test_demo.py")
"""Files with tests of what users are promised; those of benchmarks and experiments are left to ``make test-all``."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == FOLDER and item.path.name not in GUARANTEES:
            item.add_marker(pytest.mark.thorough)


@pytest.fixture
def forked_bench(imported_by_ranks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``forked_bench(name, *arguments)``: the JSON object that ``python -m tools.bench.NAME --json ...`` prints."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(ranks, "multiprocessing", SimpleNamespace(get_context=lambda method: fork))

    def run(name: str, *arguments: str) -> Any:
        command = [sys.executable, "-m", f"tools.bench.{name}", "--json", *arguments]
        with (tmp_path / "bench.out").open("wb") as out, (tmp_path / "bench.err").open("wb") as err:
            code = ForkedModule(command, stdout=out, stderr=err, env=os.environ).wait()
        said, errors = ((tmp_path / f"bench.{name}").read_text() for name in ("out", "err"))
        for name in ("out", "err"):
            (tmp_path / f"bench.{name}").unlink()
        assert code == 0, errors[-3000:]
        return json.loads(said.splitlines()[-1])

    return run
