"""What is read from a model, against the tensors of real ranks and against a count from the architecture alone."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pst_ds.config.pst import PSTConfig
from pst_ds.core.head_loss import head_loss
from pst_ds.core.quantization import Grid
from pst_ds.nn.flat_factors import flat_sizes, flatten_factors
from pst_ds.nn.inject import inject_pst
from pst_ds.nn.language_head import language_head
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine, optimizer_bytes
from pst_ds.planning.activations import trace_micro_batch
from pst_ds.planning.memory import ZeroSettings, memory_plan, zero_settings
from pst_ds.planning.shapes import _attention_width, model_numbers
from pst_ds.planning.time import Batch, step_traffic
from tests.pairs import every_pair

SHAPE = {
    "hidden_size": 56, "intermediate_size": 101, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 71,
}  # fmt: skip


WIDE = {**SHAPE, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "vocab_size": 300}
WIDE_AND_SHALLOW = {**WIDE, "num_hidden_layers": 2}


def _llama(num_shards: int, device: str = "meta", shape=SHAPE, grid=None, base_grid=None, embedding_grid=None):
    config = PSTConfig(modules_to_save=(), relative_magnitude=False)
    if shape["hidden_size"] == WIDE["hidden_size"]:  # factors as small beside the weights as those of a large model
        config = replace(config, score_rank=1, update_rank=1)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(LlamaConfig(**shape, use_cache=False), dtype=torch.bfloat16)
        return inject_pst(
            model, config, num_shards=num_shards, grid=grid, base_grid=base_grid, embedding_grid=embedding_grid
        )


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_models_numbers_are_those_of_its_architecture(num_shards):
    found = model_numbers(_llama(num_shards))
    shapes = 3 * [(56, 56), (28, 56), (28, 56), (56, 56), (101, 56), (101, 56), (56, 101)]
    outside, norms = 2 * 71 * 56, 7 * 56
    factors = 17 * sum(o + i for o, i in shapes)
    weights = sum(o * i for o, i in shapes)
    bits = sum(num_shards * math.ceil(math.ceil(o * i / num_shards) / 8) for o, i in shapes)
    assert found.parameters == weights + factors + outside + norms
    assert found.trainables == found.factor_parameters == factors
    assert found.whole_bytes == 2 * found.parameters + bits
    assert (found.score_rank, found.update_rank, found.dense_weights) == (8, 8, 56 * 71)
    assert found.attention_width == 3 * 56
    assert sorted(m.numel for m in found.matrices for _ in range(m.count)) == sorted(o * i for o, i in shapes)
    largest = 56 * 101
    typed = 2 * (largest + 17 * (56 + 101))
    assert max(m.largest_gather_bytes for m in found.modules) == typed
    masks = num_shards * math.ceil(math.ceil(largest / num_shards) / 8)
    assert max(m.gathered_bytes for m in found.modules) == typed + masks
    assert sum(m.count for m in found.modules) == 21 + 2 + 7
    assert (found.num_layers, found.num_trainables) == (21, 21 * 6)
    assert sum(m.bands * m.count for m in found.modules) == 21


def test_the_bands_of_a_backward_pass_follow_from_its_budget():
    """On a GPU a quarter of 512 MiB holds 16.8 million weights of 16 bits of a band, five tensors at a time."""
    config = LlamaConfig(**{**SHAPE, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1})
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        inject_pst(model, PSTConfig(modules_to_save=(), relative_magnitude=False))
    bands = {m.numel: m.bands for m in model_numbers(model, device="cuda").modules if m.bands}
    assert sorted(bands.values()) == [1, 1, 3]  # k and v; q and o; up, gate and down
    assert sum(m.bands * m.count for m in model_numbers(model).modules) > sum(bands.values())


@every_pair
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_count_as_the_weights_that_they_are_and_take_fewer_bytes(num_shards, bits):
    whole, coded = model_numbers(_llama(num_shards)), model_numbers(_llama(num_shards, base_grid=Grid(bits)))
    assert (coded.parameters, coded.trainables) == (whole.parameters, whole.trainables)
    assert coded.matrices == tuple(replace(group, by_kernels=False) for group in whole.matrices)  # they read no codes
    shapes = 3 * [(56, 56), (28, 56), (28, 56), (56, 56), (101, 56), (101, 56), (56, 101)]
    codes = scales = 0
    for outputs, inputs in shapes:
        share = math.ceil(outputs * inputs / num_shards)
        codes += num_shards * math.ceil(share * bits / 8)
        rows = [
            range(i * share // inputs, math.ceil(min((i + 1) * share, outputs * inputs) / inputs))
            for i in range(num_shards)
        ]
        scales += 2 * num_shards * max(map(len, rows))
    assert whole.whole_bytes - coded.whole_bytes == 2 * sum(o * i for o, i in shapes) - codes - scales


@pytest.mark.parametrize("bits", [4, 8])
def test_tables_count_as_the_weights_that_they_are_and_take_fewer_bytes(bits):
    whole, coded = model_numbers(_llama(2)), model_numbers(_llama(2, embedding_grid=Grid(bits)))
    assert (coded.parameters, coded.trainables, coded.matrices) == (whole.parameters, whole.trainables, whole.matrices)
    assert (coded.dense_weights, coded.sliced_weights) == (whole.dense_weights, 56 * 71)
    assert whole.whole_bytes - coded.whole_bytes == 2 * 71 * (2 * 56 - 56 * bits // 8 - 2)
    plain, traced = (
        trace_micro_batch(model, batch=2, sequence=9, checkpointing=False)
        for model in (_llama(2), _llama(2, embedding_grid=Grid(bits)))
    )
    assert plain.gathered - traced.gathered == 2 * 71 * (2 * 56 - 56 * bits // 8 - 2)  # each once, past a frozen head
    assert plain.gathers < traced.gathers + 1
    assert traced.activations <= plain.activations + 2 * 71 * 56  # a slice, which is all of so small a head


def _loss(head, ids, hidden):
    return head_loss(hidden.flatten(0, 1), head.readout, ids.flatten())


def _received(cases):
    """Bytes that ZeRO-3 gathers in a step, and in how many collectives, for every case."""
    from deepspeed.runtime.zero import partition_parameters

    gathered, found = [], []
    gather = partition_parameters._dist_allgather_fn

    def counted(shard, whole, *more):
        gathered.append(whole.nbytes)
        return gather(shard, whole, *more)

    partition_parameters._dist_allgather_fn = counted
    for shape, checkpointing, ds_config, frozen, is_flat in cases:
        model = _llama(2, "cpu", shape, base_grid=frozen, embedding_grid=frozen)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3}]
        if is_flat:
            flatten_factors(model, groups)
        # by itself DeepSpeed takes the dtype of the first parameter, and refuses that of codes
        partition_parameters.Init(module=model, config_dict_or_path=ds_config, dtype=torch.bfloat16)
        engine = build_engine(model, groups, ds_config=ds_config)
        ids, head = torch.arange(16).view(1, 16), language_head(engine.module)
        for _ in range(3):  # DeepSpeed records the order of modules first, and keeps nothing until it has
            gathered.clear()
            with head.reading(partial(_loss, head, ids)) as losses:
                engine(input_ids=ids)
            engine.backward(losses[0])
            engine.step()
        found.append((sum(gathered), len(gathered)))
        if not ds_config["zero_optimization"]["stage3_param_persistence_threshold"]:
            assert all(sharding.is_released(param) for param in engine.module.parameters())
    return found


@pytest.mark.zero3
@pytest.mark.thorough
def test_a_step_gathers_what_deepspeed_gathers(run_ranks):
    cases = [
        # what is kept beyond a block shows in a deep model; the rest is exact in any
        (WIDE if reuse or ahead else WIDE_AND_SHALLOW, checkpointing, {
            "train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 3, "reduce_bucket_size": 1 << 20, "stage3_param_persistence_threshold": small,
                "stage3_max_reuse_distance": reuse, "stage3_prefetch_bucket_size": ahead,
                "stage3_max_live_parameters": live,
            },
        }, frozen, False)
        for checkpointing, small, reuse, ahead, live, frozen in [
            (False, 0, 0, 0, 0, None), (False, 0, 500_000, 0, 0, None), (False, 0, 0, 60_000, 200_000, None),
            (True, 0, 0, 0, 0, None), (True, 500, 500_000, 0, 0, None), (True, 0, 0, 60_000, 200_000, None),
            (False, 0, 0, 0, 0, Grid(4, 64)), (True, 0, 0, 0, 0, Grid(8)),
        ]
    ]  # fmt: skip
    for (shape, checkpointing, config, frozen, _), found in zip(cases, run_ranks(_received, 2, cases)[0], strict=True):
        model = _llama(2, shape=shape, base_grid=frozen, embedding_grid=frozen)
        zero = zero_settings(config, 2, "gloo")
        numbers = model_numbers(model)
        small = zero.persistence_threshold
        trace = trace_micro_batch(model, batch=1, sequence=16, checkpointing=checkpointing, persistence_threshold=small)
        batch = Batch(16, 16, recomputed=float(checkpointing), trace=trace)
        counted = step_traffic(numbers, zero, batch).gathers.total * 2  # a rank receives half of what two gather
        kept = zero.max_reuse_distance or zero.prefetch_bucket_size
        assert counted == pytest.approx(found[0], rel=0.06 if kept or small else 1e-6), (checkpointing, config)
        assert found[1] <= trace.gathers + (small > 0)
        if not kept and not small:
            assert found[1] == trace.gathers


@pytest.mark.zero3
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.few(1)
def test_a_step_with_flat_factors_gathers_what_deepspeed_gathers(run_ranks, checkpointing):
    config = {
        "train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3, "reduce_bucket_size": 1 << 20, "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0,
        },
    }  # fmt: skip
    (found,) = run_ranks(_received, 2, [(WIDE_AND_SHALLOW, checkpointing, config, None, True)])[0]
    model = _llama(2, shape=WIDE_AND_SHALLOW)
    flats = flat_sizes(model, [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3}])
    numbers = model_numbers(model, flats=flats)
    assert flats == [numbers.factor_parameters] == [numbers.trainables]
    assert (numbers.num_trainables, numbers.flat_parameters, numbers.flattened_factors) == (1, 1, 2 * 7 * 6)
    trace = trace_micro_batch(model, batch=1, sequence=16, checkpointing=checkpointing, flats=flats)
    batch = Batch(16, 16, recomputed=float(checkpointing), trace=trace)
    counted = step_traffic(numbers, zero_settings(config, 2, "gloo"), batch).gathers.total * 2
    assert found == (counted, trace.gathers)
    assert (trace.trained_gathers, trace.trained) == (2, 2 * 2 * numbers.factor_parameters)  # both turns


def _held(world_size, ds_config):
    model = _llama(world_size, "cpu", grid=Grid(8))
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3}]
    engine = build_engine(model, groups, ds_config=ds_config)
    ids = torch.arange(16).view(1, 16)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    shards = {name: param.ds_tensor for name, param in engine.module.named_parameters()}
    masks, scales = (
        sum(t.nbytes for name, t in shards.items() if name.endswith(part)) for part in ("pst_mask", "pst_scales")
    )
    gradients = engine.optimizer.grad_partitions_flat_buffer.nbytes
    numbers = model_numbers(engine.module)
    assert all(sharding.is_partitioned(p) for p in engine.module.parameters())
    weights = sum(t.nbytes for t in shards.values()) - masks - scales
    return (weights, masks, scales, optimizer_bytes(engine), gradients), numbers


@pytest.mark.zero3
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.few(1)
def test_bytes_of_a_rank_are_those_its_tensors_take(run_ranks, world_size):
    config = {
        "train_batch_size": world_size, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    numbers = model_numbers(_llama(world_size, grid=Grid(8)))
    plan = memory_plan(numbers, ZeroSettings(stage=3, world_size=world_size), activations=0)
    for held, partitioned in run_ranks(_held, world_size, world_size, config):
        assert held == (plan.weights, plan.masks, plan.scales, plan.optimizer, plan.gradients)
        assert set(partitioned.tensors) == set(numbers.tensors)  # read under ZeRO-3, where shapes are hidden
    assert plan.masks >= math.ceil(numbers.pruned_weights / 8 / world_size)


def test_the_width_of_attention_is_the_sum_over_layers_of_different_sizes():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "gemma4_text",
        vocab_size=35,
        num_hidden_layers=3,
        head_dim=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        per_layer_config={2: {"head_dim": 16}},
        **sizes,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.model.layers[2].self_attn.q_proj.out_features == 4 * 16
    assert _attention_width(model) == 4 * 8 + 4 * 8 + 4 * 16


def test_an_update_form_without_kernels_has_copies_of_the_weights():
    """During a mask update; and its parameters are counted as factors."""

    def numbers(form):
        config = PSTConfig(target_modules=["0"], modules_to_save=(), update_form=form)
        return model_numbers(inject_pst(torch.nn.Sequential(torch.nn.Linear(24, 40)), config))

    plain = numbers("low-rank")
    spp = numbers("spp")
    assert (plain.updated_weights, spp.updated_weights) == (0, 40 * 24)
    assert (plain.update_rank, spp.update_rank) == (8, 0)
    assert plain.factor_parameters - spp.factor_parameters == 8 * (40 + 24) - (40 + 16 * 24)
    assert max(module.work_bytes for module in spp.modules) > max(module.work_bytes for module in plain.modules)


def test_an_update_beside_the_mask_needs_what_u_v_needs():
    """No copy of the weights, which it does not change, and the same factors."""

    def numbers(form):
        config = PSTConfig(target_modules=["0"], modules_to_save=(), update_form=form)
        return model_numbers(inject_pst(torch.nn.Sequential(torch.nn.Linear(24, 40)), config))

    assert numbers("beside") == numbers("low-rank")
