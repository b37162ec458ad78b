"""One mask update from a mid-ramp state: the same bits on any number of ranks, and those of a brute-force sort."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import unpack_range
from pst_ds.masks.update import mask_stats, update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine

SPARSITY = 0.37


def _bert():
    return BertModel(
        BertConfig(
            vocab_size=50, hidden_size=36, num_hidden_layers=2, num_attention_heads=4, intermediate_size=53,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def _gpt2():
    return GPT2Model(GPT2Config(vocab_size=50, n_embd=30, n_layer=2, n_head=3, n_positions=16))


MODELS = {"bert": _bert, "gpt2": _gpt2}


def _mid_ramp(kind, num_shards):
    """A model whose every factor is non-zero, with ties among the weights, the same in every call."""
    torch.manual_seed(3)
    model = MODELS[kind]()
    for param in model.parameters():  # coarse values make many equal scores
        param.data = (param.data * 200).round() / 200
    inject_pst(model, PSTConfig(relative_magnitude=True, modules_to_save=()), num_shards=num_shards)
    generator = torch.Generator().manual_seed(5)
    for i, layer in enumerate(pst_layers(model).values()):
        for _, param in layer.factor_parameters():
            values = torch.randn(param.shape, generator=generator) * 0.3
            param.data = (values * 8).round() / 8 if i % 2 else values
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_a_frozen_magnitude_is_that_of_the_pretrained_weights(kind):
    def checksum(frozen, *, updated):
        torch.manual_seed(3)
        config = PSTConfig(frozen_magnitude=frozen, modules_to_save=(), update_init="lora", seed=4)
        model = inject_pst(MODELS[kind](), config)
        for layer in pst_layers(model).values():
            if updated:
                layer.pst_U.data.normal_()
        return update_masks(model, SPARSITY).checksum

    assert checksum(True, updated=True) == checksum(True, updated=False) == checksum(False, updated=False)
    assert checksum(False, updated=True) != checksum(False, updated=False)


def _groups(model):
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0, "name": "all"}]


def _config(stage, **zero):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1 << 16, **zero},
    }


def _updated(kind, stage, world_size, persistence=0):
    """Checksum, sparsity, flips and every whole mask after one update."""
    model = _mid_ramp(kind, world_size if stage == 3 else 1)
    zero = {"stage3_param_persistence_threshold": persistence} if stage == 3 else {}
    config = None if stage is None else _config(stage, **zero)
    engine = build_engine(model, _groups(model), ds_config=config)
    if persistence:  # small parameters are whole from the first pass on
        engine(input_ids=torch.ones(1, 4, dtype=torch.long))
    stats = update_masks(engine.module, SPARSITY)
    masks = []
    for layer in pst_layers(engine.module).values():
        with sharding.gathered([layer.pst_mask]):
            numel = layer.layout.numel
            masks.append(unpack_range(layer.pst_mask.detach().clone(), numel, layer.num_shards, 0, numel))
    return stats, masks


def _brute_force(kind):
    """Each matrix by itself: whole scores by the written-out formula in fp32, a stable sort in flat storage order."""
    masks = []
    for layer in pst_layers(_mid_ramp(kind, 1)).values():
        layout, width = layer.layout, layer.layout.out_features // layer.layout.num_matrices
        storage = torch.arange(layout.numel).view(layout.shape)
        index = storage.t() if layout.transposed else storage  # (O, I): flat storage index of each weight
        weight = layer.weight.detach().t() if layout.transposed else layer.weight.detach()
        mask = torch.ones(layout.numel, dtype=torch.uint8)
        f = {name: param.detach() for name, param in layer.factor_parameters()}
        for part in range(layout.num_matrices):
            o = slice(part * width, (part + 1) * width)
            r, k = slice(part * 8, part * 8 + 8), slice(part * 8, part * 8 + 8)
            score = weight[o].clone()
            for j in range(8):
                score = score + f["U"][o, j : j + 1] * f["V"][r][j]
            score = score.abs() * (1.0 / layer.magnitude_scales[part])
            for j in range(8):
                score = score + f["A"][o, j : j + 1] * f["B"][k][j]
            if layout.transposed:  # (R 1' + 1 C')' = C 1' + 1 R': the sum runs in storage order
                score = score + f["C"][part] + f["R"][o, None]
            else:
                score = score + f["R"][o, None] + f["C"][part]
            order = index[o].flatten().argsort()
            by_storage = score.flatten()[order]
            pruned = by_storage.sort(stable=True).indices[: math.floor(SPARSITY * by_storage.numel())]
            mask[index[o].flatten()[order][pruned]] = 0
        masks.append(mask)
    return masks


@pytest.mark.zero3
@pytest.mark.parametrize("kind", MODELS)
def test_masks_are_the_same_bits_on_1_2_3_and_4_ranks(run_ranks, kind):
    expected = _brute_force(kind)
    local, local_masks = _updated(kind, None, 1)
    assert all(torch.equal(a, b) for a, b in zip(local_masks, expected, strict=True))
    for world_size in (1, 2, 3, 4):
        for stats, masks in run_ranks(_updated, world_size, kind, 3, world_size):
            assert stats == local
            assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True)), world_size
    numel = [layer.layout.matrix_numel for layer in pst_layers(_mid_ramp(kind, 1)).values()]
    parts = [layer.layout.num_matrices for layer in pst_layers(_mid_ramp(kind, 1)).values()]
    assert local.num_pruned == sum(p * math.floor(SPARSITY * n) for n, p in zip(numel, parts, strict=True))
    assert local.num_flipped == local.num_pruned


@pytest.mark.zero3
@pytest.mark.parametrize("stage", [0, 2])
def test_unpartitioned_stages_give_the_same_masks(run_ranks, stage):
    local, _ = _updated("bert", None, 1)
    for stats, _ in run_ranks(_updated, 2, "bert", stage, 2):
        assert stats == local


@pytest.mark.zero3
def test_persistent_parameters_give_the_same_masks(run_ranks):
    local, _ = _updated("bert", None, 1)
    for stats, _ in run_ranks(_updated, 2, "bert", 3, 2, 10**6):
        assert stats == local


def _forward_after_update(persistence):
    model = _mid_ramp("bert", 2)
    engine = build_engine(model, _groups(model), ds_config=_config(3, stage3_param_persistence_threshold=persistence))
    inputs = {"input_ids": torch.arange(6).view(1, 6)}
    engine.eval()
    with torch.no_grad():
        before = engine(**inputs).last_hidden_state.clone()
        update_masks(engine.module, 0.6)
        return before, engine(**inputs).last_hidden_state


@pytest.mark.zero3
@pytest.mark.parametrize("persistence", [0, 10**6])
def test_the_next_forward_uses_the_new_masks(run_ranks, persistence):
    model = _mid_ramp("bert", 1).eval()
    inputs = {"input_ids": torch.arange(6).view(1, 6)}
    with torch.no_grad():
        dense = model(**inputs).last_hidden_state
        update_masks(model, 0.6)
        sparse = model(**inputs).last_hidden_state
    assert not torch.allclose(dense, sparse, atol=1e-3)
    for before, after in run_ranks(_forward_after_update, 2, persistence):
        torch.testing.assert_close(before, dense)
        torch.testing.assert_close(after, sparse)


def _update_with_nan(rank_with_nan):
    import torch.distributed as dist

    model = _mid_ramp("bert", 2)
    engine = build_engine(model, _groups(model), ds_config=_config(3))
    layer = pst_layers(model)["encoder.layer.1.output.dense"]
    if dist.get_rank() == rank_with_nan:
        sharding.shard_of(layer.weight).values[3] = float("nan")
    before = mask_stats(engine.module).checksum
    with pytest.raises(FloatingPointError, match=r"encoder\.layer\.1\.output\.dense are not finite"):
        update_masks(engine.module, 0.5)
    return before == mask_stats(engine.module).checksum


@pytest.mark.zero3
def test_a_nan_on_one_rank_is_refused_on_all_and_masks_stay(run_ranks):
    assert run_ranks(_update_with_nan, 2, 1) == [True, True]


def test_flip_rate_and_checksum_follow_the_masks():
    model = _mid_ramp("bert", 1)
    first = update_masks(model, 0.5)
    again = update_masks(model, 0.5)
    assert again.num_flipped == 0
    assert again.checksum == first.checksum
    more = update_masks(model, 0.6)
    assert more.num_flipped == more.num_pruned - first.num_pruned > 0
    assert more.checksum != first.checksum
    assert mask_stats(model).checksum == more.checksum
