"""The same mask update under every ZeRO stage, with parameters on the CPU, and with hpZ's second copies."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import relayout
from pst_ds.masks.update import mask_stats, update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine

SPARSITIES = (0.37, 0.6)
ZERO = {
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "3 offload": {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    "3 hpZ": {"stage": 3, "zero_hpz_partition_size": 2},
    "3 hpZ persistent": {
        "stage": 3, "zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 1 << 20,
    },
}  # fmt: skip
INPUTS = {"input_ids": torch.arange(6).view(1, 6)}


def _model(num_shards):
    """Every factor non-zero, ties among the weights, sizes that divide by no number of ranks; equal in every call."""
    torch.manual_seed(3)
    model = BertModel(
        BertConfig(
            vocab_size=50, hidden_size=27, num_hidden_layers=1, num_attention_heads=3, intermediate_size=53,
            max_position_embeddings=16,
        )
    )  # fmt: skip
    for param in model.parameters():
        param.data = (param.data * 200).round() / 200
    inject_pst(model, PSTConfig(modules_to_save=()), num_shards=num_shards)
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        for _, param in layer.factor_parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.3
    return model.eval()


def _course(engine):
    """Of each update: its stats, every whole mask, and the hidden states that a forward pass then gives."""
    seen = []
    for sparsity in SPARSITIES:
        stats = update_masks(engine.module, sparsity)
        with torch.no_grad():
            hidden = engine(**INPUTS).last_hidden_state.clone()
        seen.append((stats, _masks(engine.module), hidden))
    return seen


def _masks(model):
    masks = []
    for layer in pst_layers(model).values():
        with sharding.gathered([layer.pst_mask]):
            masks.append(relayout(layer.pst_mask.detach().clone(), layer.layout.numel, layer.num_shards, 1))
    return masks


def _groups(model):
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1e-3, "name": "all"}]


def _engine(kind, world_size):
    zero = {"reduce_bucket_size": 1 << 16, "stage3_param_persistence_threshold": 0, **ZERO[kind]}
    if zero["stage"] < 3:
        del zero["stage3_param_persistence_threshold"]
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
    }  # fmt: skip
    model = _model(world_size if zero["stage"] == 3 else 1)
    engine = build_engine(model, _groups(model), ds_config=config)
    engine.eval()
    return engine


def _distributed_course(kind, world_size):
    engine = _engine(kind, world_size)
    with torch.no_grad():
        engine(**INPUTS)  # persistent parameters are whole, and hpZ's second copies there, from now on
    return _course(engine)


@pytest.mark.zero3
@pytest.mark.parametrize(
    ("kind", "world_size"), [("1", 2), ("2", 2), ("3 offload", 3), ("3 hpZ", 4), ("3 hpZ persistent", 4)]
)
def test_masks_and_the_forwards_after_them_are_those_of_one_process(run_ranks, kind, world_size):
    model = _model(1)
    expected = _course(build_engine(model, _groups(model), ds_config=None))
    assert not torch.allclose(expected[0][2], expected[1][2], atol=1e-3)
    for seen in run_ranks(_distributed_course, world_size, kind, world_size):
        for (stats, masks, hidden), (own_stats, own_masks, own_hidden) in zip(expected, seen, strict=True):
            assert own_stats == stats
            assert all(torch.equal(a, b) for a, b in zip(masks, own_masks, strict=True))
            torch.testing.assert_close(own_hidden, hidden)


def _second_copies(world_size):
    """Which frozen parameters have a second copy: after a pass, after an update, and after the next pass."""
    engine = _engine("3 hpZ", world_size)
    frozen = [(n.rpartition(".")[2], p) for n, p in engine.module.named_parameters() if not p.requires_grad]

    def look():
        return {name: {p.ds_secondary_tensor is not None for n, p in frozen if n == name} for name in _KINDS}

    def kept():
        return [p.ds_secondary_tensor for n, p in frozen if n == "weight"]

    with torch.no_grad():
        engine(**INPUTS)
        first, weights = look(), kept()
        assert {t.numel() for t in weights if t is not None} != {p.ds_tensor.numel() for _, p in frozen}
        update_masks(engine.module, 0.5)
        second = look()
        same = all(a is b for a, b in zip(weights, kept(), strict=True))
        engine(**INPUTS)
    return first, second, look(), same


_KINDS = ("weight", "pst_mask")


@pytest.mark.zero3
def test_an_update_drops_hpz_copies_of_the_masks_alone(run_ranks):
    for first, second, third, same in run_ranks(_second_copies, 4, 4):
        assert first == third == {"weight": {True}, "pst_mask": {True}}
        assert second == {"weight": {True}, "pst_mask": {False}}
        assert same


def _trained_course(kind, world_size):
    """Training steps, each followed by an update: gradient norms, and the checksum of the last masks."""
    engine = _engine(kind, world_size)
    target = torch.randn(1, 6, 27, generator=torch.Generator().manual_seed(8))
    norms = []
    for sparsity in SPARSITIES:
        engine.backward((engine(**INPUTS).last_hidden_state * target).sum())
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        update_masks(engine.module, sparsity)
    return norms, mask_stats(engine.module).checksum


@pytest.mark.thorough
@pytest.mark.zero3
def test_training_goes_on_under_the_new_masks_as_at_stage_3(run_ranks):
    (norms, checksum), *_ = run_ranks(_trained_course, 2, "3", 2)
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)
    for kind, world_size in (("1", 2), ("3 offload", 2), ("3 hpZ", 4)):
        for own_norms, own_checksum in run_ranks(_trained_course, world_size, kind, world_size):
            assert own_norms == pytest.approx(norms, rel=1e-5), kind
            assert own_checksum == checksum, kind
