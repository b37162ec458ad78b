"""Bytes that a plan counts within and between nodes, against those that ranks report in metrics.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import launch_environment
from pst_ds.planning.plan import PlanOptions, plan
from pst_ds.train.prepare import prepare
from pst_ds.train.run import train_prepared

RANKS, NODE = 4, 2
MACHINE = f"""
name = "two nodes"
code = "native"
flops = 1e12
memory_bytes = 1e11
node_size = {NODE}
node_bytes = 1e9
network_bytes = 1e9
latency = 0
capacity = 64e9
"""


def _train(run):
    os.environ |= {"LOCAL_WORLD_SIZE": str(NODE), "LOCAL_RANK": str(int(os.environ["RANK"]) % NODE)}
    context = prepare(run, launch_environment())
    train_prepared(context, quiet=True)


@pytest.mark.zero3
@pytest.mark.parametrize("placement", ["sharded", "auto", "replicated"])
@pytest.mark.few(1)
def test_a_step_receives_what_is_planned_within_nodes_and_between_them(run_ranks, tmp_path, placement):
    settings = [f'output_dir="{tmp_path}/run"', "train.num_steps=8", f'model.base_placement="{placement}"']
    run = load_run("tests/data/world_size.toml", settings)
    (tmp_path / "machine.toml").write_text(MACHINE)
    planned = plan(run, PlanOptions(RANKS, str(tmp_path / "machine.toml")))
    assert planned.placement == {"auto": "node"}.get(placement, placement)
    run_ranks(_train, RANKS, run)
    lines = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    (step,) = (line for line in lines if line["event"] == "step" and line["step"] == 5)  # long after a mask update
    between = planned.time.step_between_nodes
    assert between == pytest.approx(step["bytes_between_nodes"], rel=0.1)
    assert planned.time.step_received - between == pytest.approx(step["bytes_within_node"], rel=0.1)
