"""What is read from a model, against the tensors of real ranks and against a count from the architecture alone."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pst_ds.config.pst import PSTConfig
from pst_ds.nn.inject import inject_pst
from pst_ds.parallel import zero3
from pst_ds.parallel.engine import build_engine, optimizer_bytes
from pst_ds.planning.memory import ZeroSettings, memory_plan
from pst_ds.planning.shapes import model_numbers
from tools.docs.scaling import Llama

SHAPE = {
    "hidden_size": 56, "intermediate_size": 101, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 71,
}  # fmt: skip


def _llama(num_shards: int, device: str = "meta"):
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE, use_cache=False), dtype=torch.bfloat16)
        return inject_pst(model, PSTConfig(modules_to_save=(), relative_magnitude=False), num_shards=num_shards)


def _sorted(items):
    return sorted(map(repr, items))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_models_numbers_are_those_of_its_architecture(num_shards):
    found, expected = model_numbers(_llama(num_shards)), Llama(56, 101, 3, 71, 28).numbers(num_shards, "cpu")
    assert found.parameters == expected.parameters
    assert (
        found.trainables
        == found.factor_parameters
        == expected.factor_parameters
        == 17 * 3 * ((56 + 56) * 2 + (28 + 56) * 2 + (56 + 101) * 3)
    )
    assert found.whole_bytes == expected.whole_bytes
    assert (found.score_rank, found.update_rank, found.dense_weights) == (8, 8, 56 * 71)
    assert found.attention_width == expected.attention_width
    assert sorted(m.numel for m in found.matrices for _ in range(m.count)) == sorted(
        m.numel for m in expected.matrices for _ in range(m.count)
    )
    assert max(m.gathered_bytes for m in found.modules) == max(m.gathered_bytes for m in expected.modules)
    zero = ZeroSettings(stage=3, world_size=num_shards)
    plans = [memory_plan(n, zero, activations=0) for n in (found, expected)]
    assert plans[0] == plans[1]


def _held(world_size, ds_config):
    model = _llama(world_size, "cpu")
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3}]
    engine = build_engine(model, groups, ds_config=ds_config)
    ids = torch.arange(16).view(1, 16)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    shards = {name: param.ds_tensor for name, param in engine.module.named_parameters()}
    masks = sum(t.nbytes for name, t in shards.items() if name.endswith("pst_mask"))
    gradients = engine.optimizer.grad_partitions_flat_buffer.nbytes
    numbers = model_numbers(engine.module)
    assert all(zero3.is_partitioned(p) for p in engine.module.parameters())
    return sum(t.nbytes for t in shards.values()) - masks, masks, optimizer_bytes(engine), gradients, numbers


@pytest.mark.zero3
@pytest.mark.parametrize("world_size", [2, 3])
def test_bytes_of_a_rank_are_those_its_tensors_take(run_ranks, world_size):
    config = {
        "train_batch_size": world_size, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    numbers = model_numbers(_llama(world_size))
    plan = memory_plan(numbers, ZeroSettings(stage=3, world_size=world_size), activations=0)
    for weights, masks, optimizer, gradients, partitioned in run_ranks(_held, world_size, world_size, config):
        assert (weights, masks, optimizer, gradients) == (plan.weights, plan.masks, plan.optimizer, plan.gradients)
        assert set(partitioned.tensors) == set(numbers.tensors)  # read under ZeRO-3, where shapes are hidden
    assert plan.masks >= math.ceil(numbers.pruned_weights / 8 / world_size)
