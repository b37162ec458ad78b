"""Experts in a plan: what a token is multiplied with, what is gathered at a time, and what is kept for the backward."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pst_ds.config.pst import PSTConfig
from pst_ds.nn.inject import inject_pst
from pst_ds.planning.activations import trace_micro_batch
from pst_ds.planning.memory import layer_work_bytes
from pst_ds.planning.shapes import model_numbers
from pst_ds.planning.time import Batch, step_flops

WIDTH, INNER, EXPERTS, PER_TOKEN, BLOCKS = 64, 24, 16, 4, 2
SHAPE = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": BLOCKS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50, "num_experts_per_tok": PER_TOKEN, "use_cache": False,
}  # fmt: skip


def _qwen3(**settings):
    config = Qwen3MoeConfig(**SHAPE, moe_intermediate_size=INNER, num_experts=EXPERTS)
    return _injected(Qwen3MoeForCausalLM, config, **settings)


def _gpt_oss(**settings):
    return _injected(GptOssForCausalLM, GptOssConfig(**SHAPE, num_local_experts=EXPERTS), **settings)


def _injected(kind, config, device="meta", **settings):
    with torch.device(device):
        model = kind._from_config(config, dtype=torch.bfloat16)
    return inject_pst(model, PSTConfig(modules_to_save=(), relative_magnitude=False, **settings))


def test_a_token_is_multiplied_with_its_own_experts_alone():
    numbers, dense = model_numbers(_qwen3()), model_numbers(_qwen3(exclude_modules=("experts",)))
    of_experts = BLOCKS * EXPERTS * 3 * INNER * WIDTH
    assert numbers.pruned_weights - dense.pruned_weights == of_experts
    assert numbers.multiplied_weights - dense.multiplied_weights == of_experts * PER_TOKEN / EXPERTS
    assert numbers.num_matrices - dense.num_matrices == BLOCKS * EXPERTS * 3
    products = [
        step_flops(n, Batch(tokens=1000, sequence=1000)) - step_flops(n, Batch(tokens=0, sequence=0))
        for n in (numbers, dense)
    ]
    assert products[0] - products[1] == 6 * 1000 * of_experts * PER_TOKEN / EXPERTS


def test_one_stack_is_gathered_at_a_time_and_one_expert_merged():
    model = _qwen3()
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    modules = model_numbers(model).modules
    largest = max(module.gathered_bytes for module in modules)
    assert largest == sum(param.numel() * param.element_size() for param in stack.parameters())
    work = layer_work_bytes(stack.layout.expert, 2)
    assert max(module.work_bytes for module in modules) == max(
        work, layer_work_bytes(model.model.layers[0].self_attn.q_proj.layout, 2)
    )
    assert work < 2 * stack.layout.numel * 2 / EXPERTS * 8


@pytest.mark.parametrize("build", [_qwen3, _gpt_oss])
@pytest.mark.parametrize("settings", [{}, {"target_modules": ("down_proj",)}])
def test_activations_are_those_that_are_kept_with_evenly_routed_tokens(build, settings):
    batch, sequence = 2, 64
    traced = trace_micro_batch(build(**settings), batch=batch, sequence=sequence, checkpointing=False)
    model = build(device="cpu", **settings).train()
    kept, own = {}, {param.untyped_storage().data_ptr() for param in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
        return tensor

    ids = torch.zeros(batch, sequence, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids).logits.sum()
    saved = sum(kept.values())
    assert saved < traced.activations < 1.6 * saved  # and what the head and the backward pass have for a moment
