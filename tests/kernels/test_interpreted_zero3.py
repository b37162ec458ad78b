"""Mask updates by kernels under ZeRO-3, on ranks with a pretended device each."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="needs triton 3.6, the extra of that name")

from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.config.pst import PSTConfig
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.engine import build_engine
from tests.device.accelerator import with_device
from tests.device.pretended import counts
from tests.kernels.kernels_on_device import serve_the_device

pytestmark = [pytest.mark.interpreted, pytest.mark.zero3]
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def _llama(num_layers, pattern, num_shards):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=num_layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    inject_pst(
        model, PSTConfig(pattern=pattern, score_rank=1, update_rank=1, modules_to_save=()), num_shards=num_shards
    )
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = torch.randn_like(param) * 0.05
    return model


def _updated(num_layers, pattern):
    """Statistics of the masks, and the launches and waits that an update took."""
    serve_the_device()
    model = _llama(num_layers, pattern, 2)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-2, "name": "all"}]
    engine = build_engine(model, groups, ds_config=DEEPSPEED)
    before = counts.launches, counts.num_waits
    stats = update_masks(engine.module, 0.5, progress=0.6)
    return stats, counts.launches - before[0], counts.num_waits - before[1]


@pytest.mark.parametrize("pattern", ["matrix", "2:4"])
def test_many_matrices_take_the_launches_and_waits_of_few(pattern, run_ranks):
    few, many = [run_ranks(with_device, 2, _updated, num_layers, pattern) for num_layers in (2, 4)]
    assert few[0][1:] == many[0][1:]
    _, launches, waits = many[0]
    assert launches <= 200
    assert waits + 1 <= 8  # the last is for gathers that follow
    assert many[0][0] == many[1][0] == update_masks(_llama(4, pattern, 1), 0.5, progress=0.6)
