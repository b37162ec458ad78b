"""Bytes that a plan counts within and between nodes, against those that ranks report in metrics.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

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
    planned = _planned_and_received(load_run("tests/data/world_size.toml", settings), run_ranks, tmp_path)
    assert planned.placement == {"auto": "node"}.get(placement, placement)


def _planned_and_received(run, run_ranks, folder):
    """Return the plan of a run, after a comparison with a step of the run that is long after a mask update."""
    (folder / "machine.toml").write_text(MACHINE)
    planned = plan(run, PlanOptions(RANKS, str(folder / "machine.toml")))
    run_ranks(_train, RANKS, run)
    lines = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    (step,) = (line for line in lines if line["event"] == "step" and line["step"] == 5)
    between = planned.time.step_between_nodes
    assert between == pytest.approx(step["bytes_between_nodes"], rel=0.1)
    assert planned.time.step_received - between == pytest.approx(step["bytes_within_node"], rel=0.1)
    return planned


@pytest.mark.zero3
def test_a_step_with_experts_on_ranks_receives_what_is_planned(run_ranks, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained("tests/data/tiny-llama")
    config = transformers.Qwen2MoeConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, num_experts=8, num_experts_per_tok=2,
        shared_expert_intermediate_size=64, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings = json.loads(Path("ds_configs/zero3_cpu.json").read_text())
    settings["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    more = {"output_dir": "run", "model.path": "base", "deepspeed_config": "ds.json"}
    paths = [f'{name}="{tmp_path}/{value}"' for name, value in more.items()]
    sets = [*paths, "train.num_steps=8", 'train.precision="bf16"', "train.expert_parallel=2"]
    _planned_and_received(load_run("tests/data/causal_lm.toml", sets), run_ranks, tmp_path)
