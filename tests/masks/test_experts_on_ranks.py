"""Experts that ranks divide among them: the same outputs and mask bits as in one process, in every pattern."""

from __future__ import annotations

import pytest
import torch

from pst_ds.checkpoint.adapter import save_pretrained
from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import unpack_range, unpack_shard
from pst_ds.core.quantization import Grid
from pst_ds.errors import InputError
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.ranks import rank
from tests.nn.expert_families import tiny_model

CASES = {
    "matrix": ("qwen2_moe", 0.6),
    "stack": ("gpt_oss", 0.6),
    "global": ("qwen2_moe", 0.6),
    "row": ("gpt_oss", 0.6),
    "2:4": ("qwen2_moe", 0.3),
    "4x2": ("aria", 0.6),
}
"""A family and a sparsity for each pattern. gpt_oss has biases; its stacks, and those of aria, are transposed."""
IDS = torch.randint(0, 48, (4, 9), generator=torch.Generator().manual_seed(1))


def _updated(pattern, degree=1, base_grid=None):
    """A model with random factors after an update; its counts and checksum, and the logits of this rank's sequence."""
    family, sparsity = CASES[pattern]
    model = tiny_model(family)
    if degree > 1:
        import deepspeed

        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    inject_pst(model, PSTConfig(pattern=pattern), base_grid=base_grid, expert_parallel=degree)
    generator = torch.Generator().manual_seed(2)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():  # of few different values, so that scores are equal across experts
            values = (torch.randn(sharding.full_shape(param), generator=generator) * 2).round() / 8
            sharding.write_whole(param, values)
    stats = update_masks(model, sparsity)
    with torch.no_grad(), sharding.gathered(model.parameters()):
        logits = model(input_ids=IDS[rank() % 4 :][:1]).logits if degree > 1 else model(input_ids=IDS).logits
    return model, stats, logits


def _own_bits(layer):
    start, stop = layer.own_range()
    return start, stop, unpack_shard(sharding.shard_of(layer.pst_mask).values, stop - start).clone()


def _on_ranks(degree, folder):
    """Two thirds of an expert lie on each of six ranks, of which three have the same experts."""
    found = {}
    for pattern, grid in ((p, g) for p in CASES for g in (None, Grid(8, None))):
        model, stats, logits = _updated(pattern, degree, grid)
        layers = {name: (_own_bits(layer), layer.all_magnitude_scales) for name, layer in pst_layers(model).items()}
        found[pattern, grid is None] = stats, logits, layers
    model, *_ = _updated("matrix", degree)
    stack = next(layer for layer in pst_layers(model).values() if layer.group)
    scores = torch.zeros(sharding.full_shape(stack.pst_R))
    scores[0] = float("nan")  # of the first expert, which some ranks do not have
    sharding.write_whole(stack.pst_R, scores)
    with pytest.raises(FloatingPointError, match=r"experts\.gate_up_proj are not finite"):
        update_masks(model, 0.5)
    with pytest.raises(InputError, match="an adapter state has whole stacks of experts"):
        save_pretrained(model, folder)
    return found


@pytest.mark.zero3
@pytest.mark.few(1)
@pytest.mark.parametrize(("world_size", "degree"), [(6, 2), (2, 2), (4, 4)])
def test_masks_and_outputs_are_those_of_one_process(run_ranks, tmp_path, world_size, degree):
    ranks = run_ranks(_on_ranks, world_size, degree, tmp_path)
    for pattern, grid in ((p, g) for p in CASES for g in (None, Grid(8, None))):
        model, stats, logits = _updated(pattern, base_grid=grid)
        seen = dict.fromkeys(pst_layers(model), 0)
        for number, found in enumerate(ranks):
            own_stats, own_logits, layers = found[pattern, grid is None]
            assert own_stats == stats, pattern
            torch.testing.assert_close(own_logits[0], logits[number % 4], rtol=0, atol=1e-5)
            for name, layer in pst_layers(model).items():
                (start, stop, bits), scales = layers[name]
                assert torch.equal(
                    bits, unpack_range(layer.pst_mask, layer.layout.numel, layer.num_shards, start, stop)
                ), name
                assert scales == layer.magnitude_scales
                seen[name] += stop - start
        assert seen == {name: layer.layout.numel for name, layer in pst_layers(model).items()}
