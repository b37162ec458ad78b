"""launch/elastic.sh on two hosts: a killed rank, a host that is cut off, one that joins, a stop, and bad input."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tools.cluster.elastic import ElasticHosts, elastic_hosts
from tools.cluster.processes import RUN_FILE, LackError, steps, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.launcher]
ADDRESSES = {"host-a": "10.213.78.1", "host-b": "10.213.78.2"}
RUN_SECONDS = 240
NOTICE_SECONDS = 90
AGAIN_SECONDS = 180


@pytest.fixture
def elastic(tmp_path) -> Iterator[ElasticHosts]:
    try:
        with elastic_hosts(tmp_path, ADDRESSES) as hosts:
            yield hosts
    except LackError as error:
        if os.environ.get("PST_DS_REQUIRE_CLUSTER") == "1":
            pytest.fail(f"PST_DS_REQUIRE_CLUSTER=1, but {error}", pytrace=False)
        pytest.skip(str(error))


def test_a_run_goes_on_without_a_lost_host_and_with_one_that_joins(elastic, tmp_path):
    folder = tmp_path / "run"
    settings = [f"output_dir={folder}", "train.num_steps=100000", "checkpoint.interval=5", "eval.interval=-1"]
    words = [RUN_FILE, *(word for setting in settings for word in ("--set", setting))]

    def reached(step: int) -> bool:
        return bool(steps(folder)) and steps(folder)[-1] >= step

    def new_ranks(count: int, old: set[int]) -> bool:
        now = set(elastic.ranks(folder).values())
        return len(now) == count and not now & old

    for host in ADDRESSES:
        elastic.start(host, words)
    wait_until(lambda: reached(6) and new_ranks(2, set()), RUN_SECONDS, elastic.text)

    ranks = elastic.ranks(folder)
    os.kill(ranks[1], signal.SIGKILL)
    wait_until(lambda: new_ranks(2, set(ranks.values())), NOTICE_SECONDS, elastic.text)
    wait_until(lambda: reached(20), RUN_SECONDS, elastic.text)

    old = set(elastic.ranks(folder).values())
    elastic.network.cut_off("host-b")
    at_cut = steps(folder)[-1]
    wait_until(lambda: not old & set(elastic.ranks(folder).values()), NOTICE_SECONDS, elastic.text)
    wait_until(lambda: new_ranks(1, old) and reached(at_cut + 5), AGAIN_SECONDS, elastic.text)

    elastic.network.connect("host-b")
    elastic.kill("host-b")
    elastic.start("host-b", words)
    wait_until(lambda: new_ranks(2, old), RUN_SECONDS, elastic.text)
    joined_at = steps(folder)[-1]
    wait_until(lambda: reached(joined_at + 10), RUN_SECONDS, elastic.text)
    for agent in elastic.agents.values():
        agent.process.terminate()
    assert [agent.exit_code(RUN_SECONDS) for agent in elastic.agents.values()] == [75, 75], elastic.text()
    assert not elastic.ranks(folder)
    assert steps(folder) == list(range(1, steps(folder)[-1] + 1))
    assert (folder / "checkpoints" / "latest").resolve().name == f"step-{steps(folder)[-1]:08d}"


def test_bad_input_ends_at_once_with_2(elastic, tmp_path):
    words = [RUN_FILE, "--set", f"output_dir={tmp_path}/run", "--set", "train.batch_size=1"]
    for host in ADDRESSES:
        elastic.start(host, words)
    assert [agent.exit_code(RUN_SECONDS) for agent in elastic.agents.values()] == [2, 2], elastic.text()
    assert elastic.agents["host-a"].text().count("pst-ds train: ") == 1
