"""Fixtures: the kinds of cluster, and commands in the background, ended whatever happens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tools.cluster.processes import Background, LackError, ended_after
from tools.cluster.slurm import Slurm, slurm_cluster

from .hosts import Hosts, two_hosts


@contextmanager
def _skipped_where_lacking() -> Iterator[None]:
    """Skip a test that lacks a piece, or fail where PST_DS_REQUIRE_CLUSTER=1 says that it must be there."""
    try:
        yield
    except LackError as error:
        if os.environ.get("PST_DS_REQUIRE_CLUSTER") == "1":
            pytest.fail(f"PST_DS_REQUIRE_CLUSTER=1, but {error}", pytrace=False)
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with _skipped_where_lacking(), slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def slurm_of_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """One whose nodes are hosts of their own."""
    with _skipped_where_lacking(), slurm_cluster(tmp_path_factory.mktemp("slurm"), apart=True) as cluster:
        yield cluster


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with _skipped_where_lacking(), two_hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Background]]:
    """``start(*command, env=None)``: the command, in the background."""
    with ExitStack() as stack:
        logs = (tmp_path / f"output-{number}" for number in range(1000))
        yield lambda *command, env=None: stack.enter_context(ended_after(Background(next(logs), *command, env=env)))
