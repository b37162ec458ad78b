"""Fixtures: the two kinds of cluster, and commands in the background, ended whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from .hosts import Hosts, two_hosts
from .slurm import Slurm, slurm_cluster
from .tools import Background, ended_after


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Background]]:
    """``start(*command, env=None)``: the command, in the background."""
    with ExitStack() as stack:
        logs = (tmp_path / f"output-{number}" for number in range(1000))
        yield lambda *command, env=None: stack.enter_context(ended_after(Background(next(logs), *command, env=env)))
