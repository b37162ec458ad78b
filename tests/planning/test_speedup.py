"""Shares of feed-forward channels for a speed-up, against the FLOPs of real forward passes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from pst_ds.config.one_shot import ENGINES
from pst_ds.config.toml import run_from_table
from pst_ds.errors import InputError
from pst_ds.nn.cut_config import cut_config
from pst_ds.planning.speedup import share_for
from tests.nn.expert_families import tiny_model

WIDE = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {"bert": BertConfig(**WIDE), "llama": LlamaConfig(**WIDE, num_key_value_heads=2)}
"""The third family has eight experts."""


def _run(tmp_path, family):
    config = CONFIGS[family] if family in CONFIGS else tiny_model(family).config
    if family not in CONFIGS:
        config.moe_intermediate_size = config.shared_expert_intermediate_size = 64
    config.save_pretrained(tmp_path)
    task = "classification" if family == "bert" else "causal-lm"
    return config, run_from_table(
        {"output_dir": "out", "task": task, "model": {"path": str(tmp_path)}, "data": {"train": "a.jsonl"},
         "train": {"num_steps": 1}}
    )  # fmt: skip


@torch.no_grad()
def _flops(config, family):
    """FLOPs of a text of one token, which attends to nothing else."""
    kind = AutoModelForSequenceClassification if family == "bert" else AutoModelForCausalLM
    model = kind.from_config(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        (model.bert.encoder if family == "bert" else model)(
            torch.zeros(1, 1, config.hidden_size) if family == "bert" else torch.zeros(1, 1, dtype=torch.int64)
        )
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2_moe"])
def test_the_largest_share_with_the_speed_up_of_counted_flops(tmp_path, family):
    config, run = _run(tmp_path, family)
    full, speeds = _flops(config, family), {}
    for part in range(1, 16):
        smaller = config.from_dict(config.to_dict())
        try:
            cut_config(smaller, part / 16)
        except InputError:
            continue
        speeds[part / 16] = full / _flops(smaller, family)
    assert len(speeds) >= 3
    for share, speed in speeds.items():
        found, expected = share_for(run, speed * 0.995, "gpu")
        assert found == share
        assert expected == pytest.approx(speed, rel=0.02)  # routers are not counted


def test_engines_with_other_work_need_a_smaller_share(tmp_path):
    _, run = _run(tmp_path, "llama")
    shares = [share_for(run, 1.03, engine)[0] for engine in ("gpu", "openvino", "llama.cpp")]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    for engine in ENGINES:
        with pytest.raises(InputError, match=f"speedup = 50 for {engine}: fewer feed-forward channels make"):
            share_for(run, 50, engine)
