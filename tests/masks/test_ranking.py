"""Masks by criteria in plain torch: those of the kernels where both exist, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.bits import unpack_range
from pst_ds.core.criteria.criterion import GRADIENTS, Criterion
from pst_ds.core.criteria.learned_activation import LearnedActivation
from pst_ds.core.schedule import CubicSchedule, OneShotSchedule
from pst_ds.errors import InputError
from pst_ds.masks.schedule_driver import MaskUpdater
from pst_ds.masks.update import update_masks
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.optimizer import pst_optimizer
from pst_ds.parallel.engine import build_engine

PATTERNS = ["matrix", "stack", "global", "row", "2:4", "4x1"]
RAMP = CubicSchedule(final_sparsity=0.5, num_steps=4, warmup_fraction=0.0, cooldown_fraction=0.0, update_interval=1)


class InTorch(LearnedActivation):
    """The formula of the kernels without the kernels."""

    has_kernels = False


class WeightTimesGradient(Criterion):
    needs = frozenset({GRADIENTS})

    def scores(self, part):
        return (part.weight * part.gradient).abs()


class ByPlace(Criterion):
    def scores(self, part):
        return by_place(part)


def by_place(part):
    """Pseudo-random scores that depend on the place of a weight in its layer."""
    number = part.outputs * 7919 + part.inputs * 104729
    return (number * 48271 % 2147483647 % 65536).float()


def _fused_and_plain(pattern="matrix", num_shards=None, **settings):
    """A Conv1D of three fused matrices and a linear layer, with norms of inputs and every factor set."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(3)
    model = GPT2Model(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4, n_positions=16))
    model.add_module("last", nn.Linear(32, 40))
    targets = r"h\.0\.attn\.c_attn|h\.0\.mlp\.c_fc|last"
    config = PSTConfig(target_modules=targets, modules_to_save=(), pattern=pattern, **settings)
    inject_pst(model, config, num_shards=num_shards)
    generator = torch.Generator().manual_seed(5)
    for layer in pst_layers(model).values():
        layer.input_norms = torch.rand(layer.layout.num_inputs, generator=generator) + 0.5
        for _, param in layer.factor_parameters():
            param.data = torch.randn(param.shape, generator=generator) * 0.3
    return model


def _mask(layer):
    bits = layer.pst_mask.detach().flatten()
    return unpack_range(bits, layer.layout.numel, layer.num_shards, 0, layer.layout.numel).view(layer.layout.shape)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_in_torch_are_those_of_the_kernels(pattern):
    sums = [update_masks(_fused_and_plain(pattern), 0.5, criterion=c).checksum for c in (None, InTorch())]
    assert sums[0] == sums[1]


def _checksums_on_ranks(pattern, world_size, criteria):
    model = _fused_and_plain(pattern, world_size)
    zero = {"stage": 3, "reduce_bucket_size": 1 << 16, "stage3_param_persistence_threshold": 0}
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0, "name": "all"}]
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    engine = build_engine(model, groups, ds_config=config)
    return [update_masks(engine.module, 0.5, criterion=criterion).checksum for criterion in criteria]


@pytest.mark.zero3
@pytest.mark.parametrize("pattern", ["matrix", "global", "2:4", "4x1"])
def test_masks_in_torch_do_not_depend_on_the_number_of_ranks(run_ranks, pattern):
    criteria = [InTorch(), ByPlace()]
    one = [update_masks(_fused_and_plain(pattern), 0.5, criterion=criterion).checksum for criterion in criteria]
    for sums in run_ranks(_checksums_on_ranks, 2, pattern, 2, criteria):
        assert sums == one


@pytest.mark.parametrize("pattern", ["matrix", "row"])
def test_a_function_sees_the_place_of_every_weight(pattern):
    model = _fused_and_plain(pattern)
    MaskUpdater(model, OneShotSchedule(final_sparsity=0.5), criterion=by_place)
    for layer in pst_layers(model).values():
        outputs = torch.arange(layer.layout.out_features).unsqueeze(1)
        inputs = torch.arange(layer.layout.in_features).unsqueeze(0)
        scores = (outputs * 7919 + inputs * 104729) * 48271 % 2147483647 % 65536
        mask = _mask(layer).t() if layer.layout.transposed else _mask(layer)
        for matrix in layer.layout.matrices():
            groups = zip(scores[matrix.outputs], mask[matrix.outputs], strict=True)
            if pattern == "matrix":
                groups = [(scores[matrix.outputs].flatten(), mask[matrix.outputs].flatten())]
            for own_scores, kept in groups:
                assert int(kept.sum()) == kept.numel() // 2
                assert own_scores[kept == 0].max() <= own_scores[kept == 1].min()


def test_gradients_are_those_of_the_masked_weight_in_the_last_batch():
    """Of all micro-batches of a step, and of no other step."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=False)
    model = inject_pst(nn.Sequential(layer), PSTConfig(target_modules=r"0", modules_to_save=(), score_rank=0))
    optimizer = pst_optimizer(model, num_steps=4)
    masks = MaskUpdater(model, RAMP, criterion=WeightTimesGradient())
    assert masks.masks.sparsity == 0.0
    (pruned,) = pst_layers(model).values()
    for _ in range(3):
        weight = pruned.masked_weight().clone().requires_grad_()
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(5, 8)
            model(x).square().sum().backward()
            (x @ weight.t()).square().sum().backward()
        optimizer.step()
        masks.after_step(optimizer)
        merged = pruned.weight + pruned.pst_U @ pruned.pst_V
        scores = (merged * weight.grad).abs().detach().flatten()
        kept = _mask(pruned).flatten().bool()
        assert scores[~kept].max() <= scores[kept].min() * 1.001
    assert pruned.listen is not None
    optimizer.zero_grad()
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    masks.after_step(optimizer)
    assert masks.is_final
    assert pruned.listen is None


def test_gradients_before_the_first_step_are_refused():
    model = inject_pst(nn.Sequential(nn.Linear(8, 6)), PSTConfig(target_modules=r"0", modules_to_save=()))
    with pytest.raises(InputError, match=r"needs gradients, and the schedule prunes to 0.5 before the first step. Set"):
        MaskUpdater(model, OneShotSchedule(final_sparsity=0.5), criterion=WeightTimesGradient())


def test_scores_of_another_shape_are_refused():
    model = inject_pst(nn.Sequential(nn.Linear(8, 6)), PSTConfig(target_modules=r"0", modules_to_save=()))
    with pytest.raises(InputError, match=r"0: the criterion FunctionCriterion returned scores of shape \(\) for weigh"):
        MaskUpdater(model, OneShotSchedule(final_sparsity=0.5), criterion=lambda part: part.weight.sum())


def test_a_criterion_with_the_zeros_of_the_base_is_refused():
    config = PSTConfig(target_modules=r"0", modules_to_save=(), initial_mask="zeros")
    with pytest.raises(InputError, match=r'criterion: initial_mask = "zeros" keeps the non-zeros of the base model'):
        MaskUpdater(inject_pst(nn.Sequential(nn.Linear(8, 6)), config), OneShotSchedule(0.5), criterion=by_place)


def test_learned_scores_do_not_train_for_a_criterion_without_them():
    model = inject_pst(nn.Sequential(nn.Linear(8, 6)), PSTConfig(target_modules=r"0", modules_to_save=()))
    (layer,) = pst_layers(model).values()
    optimizer = pst_optimizer(model, num_steps=4)
    masks = MaskUpdater(model, RAMP, criterion=by_place)
    assert not layer.scores_train
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    masks.after_step(optimizer)
    assert {group["lr"] for group in optimizer.param_groups if group["name"] == "scores"} == {0.0}
