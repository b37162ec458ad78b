"""Figures of layers: those of whole matrices in float64, on one process and on two and three ranks, in every method."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2Model

from pst_ds.config.methods import METHODS
from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import unpack_range
from pst_ds.masks.layer_stats import measure
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.engine import build_engine
from pst_ds.parallel.ranks import world_size

NORMS = ("correlation", "score_norm", "update_norm", "weight_norm")


def _model(config, num_shards=1):
    """Fused and transposed matrices whose sizes divide by no number of ranks; factors as in the middle of a run."""
    torch.manual_seed(3)
    model = GPT2Model(GPT2Config(vocab_size=50, n_embd=20, n_layer=2, n_head=2, n_positions=16, n_inner=39))
    inject_pst(model, replace(config, modules_to_save=()), num_shards=num_shards)
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        for name in "ABRCUV":
            param = getattr(layer, f"pst_{name}")
            if param is not None:
                param.data = torch.randn(param.shape, generator=generator) * 0.1
    return model


def _measured(config, stage):
    model = _model(config, world_size() if stage == 3 else 1)
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0, "name": "all"}]
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    ds_config = None if stage is None else {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    module = build_engine(model, groups, ds_config=ds_config).module
    stats = update_masks(module, 0.4)
    return measure(module, with_scores=True), stats


def _mask(layer):
    numel = layer.layout.numel
    return unpack_range(layer.pst_mask.detach(), numel, layer.num_shards, 0, numel).view(layer.layout.shape)


def _whole(layer):
    """(S, |W| / scale, learned part of S, update, W0), (O, I) float64, by the written-out formulas."""
    f = {name: param.detach().double() for name, param in layer.factor_parameters()}
    parts, width = layer.layout.num_matrices, layer.layout.out_features // layer.layout.num_matrices

    def product(left, right):
        return torch.cat([a @ b for a, b in zip(f[left].chunk(parts), f[right].chunk(parts), strict=True)])

    weight = layer.weight.detach().double()
    weight = weight.t() if layer.layout.transposed else weight
    update = product("U", "V") if "U" in f else torch.zeros_like(weight)
    scale = torch.tensor(layer.magnitude_scales, dtype=torch.float64).repeat_interleave(width)[:, None]
    magnitude = (weight + update).abs() / scale
    learned = product("A", "B") + f["R"][:, None] + f["C"].repeat_interleave(width, 0)
    return magnitude + learned, magnitude, learned, update, weight


@pytest.mark.parametrize("pattern", ["matrix", "row"])
def test_figures_are_those_of_the_whole_matrices(pattern):
    model = _model(PSTConfig(pattern=pattern))
    update_masks(model, 0.4)
    layers = list(pst_layers(model).values())
    found = measure(model, with_scores=True)
    for i, layer in enumerate(layers):
        scores, magnitude, learned, update, weight = _whole(layer)
        assert found.correlation[i] == pytest.approx(np.corrcoef(scores.flatten(), magnitude.flatten())[0, 1], rel=1e-5)
        assert found.score_norm[i] == pytest.approx(float(learned.norm()), rel=1e-6)
        assert found.update_norm[i] == pytest.approx(float(update.norm()), rel=1e-6)
        assert found.weight_norm[i] == pytest.approx(float(weight.norm()), rel=1e-6)
    assert found.mean_correlation == pytest.approx(np.mean(found.correlation))


@pytest.mark.zero3
@pytest.mark.parametrize("pattern", ["matrix", "2:4"])
def test_figures_are_the_same_on_one_two_and_three_ranks(run_ranks, pattern):
    target = ("c_fc",) if pattern == "2:4" else "all-linear"
    config = PSTConfig(pattern=pattern, target_modules=target)
    alone, stats = _measured(config, None)
    for count, stage in ((2, 3), (3, 3), (2, 2)):
        for found, of_masks in run_ranks(_measured, count, config, stage):
            assert of_masks == stats  # kept and flipped of each layer among it
            for name in NORMS:
                assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=1e-8)


def test_counts_of_layers_are_those_of_their_masks():
    model = _model(PSTConfig())
    before = [_mask(layer) for layer in pst_layers(model).values()]
    for sparsity in (0.3, 0.5):
        stats = update_masks(model, sparsity)
        after = [_mask(layer) for layer in pst_layers(model).values()]
        assert list(stats.kept) == [int(mask.sum()) for mask in after]
        assert list(stats.flipped) == [int((a != b).sum()) for a, b in zip(before, after, strict=True)]
        assert stats.num_flipped == sum(stats.flipped)
        assert stats.num_pruned == stats.num_weights - sum(stats.kept)
        before = after


HAS = {
    "pst": {"correlation", "score_norm", "update_norm"},
    "lora": {"update_norm"},
    "magnitude": set(),
    "gmp": set(),
    "masked-lora": {"update_norm"},
}


@pytest.mark.parametrize("method", HAS)
def test_a_method_has_the_figures_of_what_it_trains(method):
    model = _model(METHODS[method].pst_config(PSTConfig()))
    update_masks(model, 0.4)
    found = measure(model, with_scores=True)
    assert {name for name in NORMS if getattr(found, name)[1] is not None} == HAS[method] | {"weight_norm"}


def test_without_scores_only_norms_of_updates_and_weights_are_left():
    model = _model(PSTConfig())
    whole, short = (measure(model, with_scores=flag) for flag in (True, False))
    assert (short.update_norm, short.weight_norm) == (whole.update_norm, whole.weight_norm)
    assert set(short.correlation) == set(short.score_norm) == {None}
    assert short.mean_correlation is None


def test_scores_that_are_not_finite_have_no_figures():
    model = _model(PSTConfig())
    layer = list(pst_layers(model).values())[2]
    layer.pst_R.data[0] = float("nan")
    found = measure(model, with_scores=True)
    assert [value is None for value in found.correlation] == [i == 2 for i in range(8)]
    assert [value is None for value in found.score_norm] == [i == 2 for i in range(8)]
