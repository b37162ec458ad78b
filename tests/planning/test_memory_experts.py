"""Experts in a plan: what a token is multiplied with, what is gathered at a time, and what is kept for the backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pst_ds.config.pst import PSTConfig
from pst_ds.core.experts.routing import Routing
from pst_ds.core.layout import WeightLayout
from pst_ds.nn.experts import PSTExpertStack
from pst_ds.nn.inject import inject_pst
from pst_ds.parallel.links import Received
from pst_ds.planning.activations import trace_micro_batch
from pst_ds.planning.machines import MACHINES
from pst_ds.planning.memory import ZeroSettings, layer_work_bytes, mask_update_bytes, memory_plan
from pst_ds.planning.shapes import model_numbers
from pst_ds.planning.time import Batch, step_flops, step_traffic, time_plan, update_traffic
from tests.pairs import every_pair

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


def test_a_mask_update_exchanges_no_more_of_experts_than_borders_of_shards_cut():
    numbers, dense = model_numbers(_qwen3()), model_numbers(_qwen3(exclude_modules=("experts",)))
    zero = ZeroSettings(stage=3, world_size=3)
    reduced, of_dense = (update_traffic(n, zero).reductions.total / (2 * 2 / 3) for n in (numbers, dense))
    stacks, numel = BLOCKS * 2, INNER * WIDTH  # both of a block are cut in two places
    of_cut = 4 * numel + 3 * (4 + 2048) * 8 + 3 * 8
    assert reduced - of_dense == pytest.approx(stacks * 2 * of_cut + 8 * (BLOCKS * EXPERTS * 3 - stacks * 2), abs=4)
    held = [mask_update_bytes(n, ZeroSettings(stage=3)) - 4 * n.factor_parameters for n in (numbers, dense)]
    assert held[0] == held[1]  # on one rank none is cut


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


def test_on_a_gpu_a_stack_of_bf16_is_merged_as_a_whole_and_launches_do_not_grow_with_the_experts():
    plans = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = _qwen3().to(dtype)
        numbers = model_numbers(model, device="cuda")
        stack = model.model.layers[0].mlp.experts.gate_up_proj.layout
        (module,) = [m for m in numbers.modules if m.experts > 1 and m.numel > stack.numel]
        assert module.groups == (dtype == torch.bfloat16)
        plans[dtype] = module, time_plan(numbers, ZeroSettings(stage=3), Batch(1000, 100), MACHINES["h100"])
    (_, slow), (module, fast) = plans.values()
    assert module.work_bytes >= 3 * 2 * stack.numel  # M . W or G, dS and dW
    assert EXPERTS * fast.step_launching > slow.step_launching > 2 * fast.step_launching


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_temporaries_of_a_stack_are_planned_within_a_tenth(transposed, dtype, tensor_bytes):
    """Of few tokens, so that what is left is the merged expert, or a tile of its gradient; not the stack."""
    layout, tokens = WeightLayout(6 * 256, 256, transposed, 6, 6), 8
    weight = torch.nn.Parameter(torch.randn(6, 256, 256).to(dtype), requires_grad=False)
    config = PSTConfig()
    stack = PSTExpertStack("stack", weight, None, layout, config.rule_for("stack"), config.of_experts, 1, (1.0,) * 6)
    index = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 5]])
    routing = Routing.of(index, torch.ones(4, 2), 6)
    x, grad_y = (torch.randn(tokens, 256).to(dtype) for _ in range(2))

    def gradients():
        return stack.gradients(x, grad_y, routing, False, need_x=True, need_weight=False)

    kept = sum(grad.nbytes for grad in gradients() if grad is not None)
    peaks = [tensor_bytes(lambda: stack.product(x, routing, False)), tensor_bytes(gradients) - kept]
    planned = layer_work_bytes(layout.expert, dtype.itemsize)
    assert 0.9 * planned < max(peaks) < 1.1 * planned
    assert min(peaks) >= layout.expert.numel * dtype.itemsize


@every_pair
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


def test_experts_on_ranks_bring_tokens_to_them_and_only_owners_gather_them():
    """On 8 ranks in nodes of 4, four divide the experts; two own the same ones, on different nodes."""
    numbers, batch, ranks = model_numbers(_qwen3()), Batch(tokens=100, sequence=100), 8
    zero, local = ZeroSettings(stage=3, world_size=ranks, node_size=4), numbers.divided(4)
    assert step_flops(local, batch) - step_flops(numbers, batch) < 0  # low-rank products of own experts only
    assert local.multiplied_weights == numbers.multiplied_weights
    whole, divided = (memory_plan(some, zero, activations=0) for some in (numbers, local))
    assert divided.weights == pytest.approx(whole.weights, rel=0.01)
    assert divided.optimizer == pytest.approx(whole.optimizer, rel=0.01)
    assert divided.gathers < whole.gathers
    stacks = sum(t.nbytes for t in numbers.tensors if t.in_stack)
    trained = sum(t.nbytes for t in numbers.tensors if t.in_stack and t.trainable)
    of_all, own = numbers.whole_bytes - stacks, stacks / 4
    found = step_traffic(local, zero, batch)
    assert found.gathers.total == pytest.approx(2 * (of_all * 7 / 8 + own / 2), rel=1e-3)
    assert found.gathers.between == pytest.approx(2 * (of_all * 7 / 8 / 4 + own / 2), rel=1e-3)
    factors = 2 * numbers.trainables - trained
    placed = [replace(zero, copy_ranks=copies) for copies in (1, 4)]  # whole on each rank; in each node
    replicated, in_nodes = (step_traffic(local, some, batch).gathers for some in placed)
    assert replicated.total == pytest.approx(2 * (factors * 7 / 8 + trained / 4 / 2), rel=1e-3)
    assert in_nodes.between == pytest.approx(2 * (factors * 7 / 8 / 4 + own / 2), rel=1e-3)
    assert in_nodes.within == pytest.approx(2 * (factors * 7 / 8 * 3 / 4 + (of_all - factors) * 3 / 4), rel=1e-3)
    copies = [memory_plan(local, some, activations=0).copies for some in placed]
    frozen = numbers.copied_bytes(1) - (stacks - trained)
    assert copies == [frozen + (stacks - trained) // 4, -(-frozen // 4)]
    assert found.reductions.total == pytest.approx(factors * 7 / 8 + trained / 4 / 2, rel=1e-3)
    there_and_back = 2 * 100 * PER_TOKEN * WIDTH * 2 * BLOCKS
    assert found.exchanged == Received(2 * there_and_back * 3 / 4)  # forward and backward, in the node
    masters = 2 * (factors * 7 / 8 + trained / 4 / 2)
    assert update_traffic(local, zero).gathers.total == pytest.approx(masters, rel=1e-3)
