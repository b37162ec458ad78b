"""What tests of whole roads share: a process of its own, and verbs that answer in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, with a cache of datasets of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """``verb("eval", folder)``: what the verb says with ``--json``; it must succeed."""
    from pst_ds.cli.main import main

    def run(*arguments: str) -> dict[str, Any]:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run
