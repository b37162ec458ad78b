"""Learned ranks: what a budget keeps of all matrices, on any number of ranks and at every stage of ZeRO."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds.config.pst import PSTConfig
from pst_ds.core.schedule import CubicSchedule, OneShotSchedule
from pst_ds.core.updates.gates import is_dropped
from pst_ds.errors import InputError
from pst_ds.masks.schedule_driver import MaskUpdater
from pst_ds.masks.update import update_masks
from pst_ds.masks.update_rank_budget import drop_components
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.nn.optimizer import pst_optimizer
from pst_ds.parallel import zero3
from pst_ds.parallel.engine import build_engine

NAMES = [f"fc{i}" for i in range(5)]


def _model(num_shards=1, dtype=torch.float32, **settings):
    """Five matrices of different sizes, each with an update; the same in every call."""
    torch.manual_seed(3)
    model = nn.ModuleDict({name: nn.Linear(7 + i, 9 + 2 * i) for i, name in enumerate(NAMES)}).to(dtype)
    settings = {"target_modules": tuple(NAMES), "update_rank": 3, "update_gates": "component", **settings}
    inject_pst(model, PSTConfig(modules_to_save=(), **settings), num_shards=num_shards)
    for _, param in (pair for layer in pst_layers(model).values() for pair in layer.factor_parameters()):
        param.data.normal_()
    return model


@torch.no_grad()
def _importances(model):
    """Of every component, by the written-out formula, in the order of the layers."""
    found = []
    for layer in pst_layers(model).values():
        gates = 2 * torch.sigmoid(layer.pst_G.float())
        for j in range(3):
            gate = gates[j if gates.numel() > 1 else 0]
            added = gate * torch.outer(layer.pst_U[:, j].float(), layer.pst_V[j].float())
            found.append(float(added.square().mean().sqrt() / layer.magnitude_scales[0]))
    return found


def _kept(model):
    return [flag for layer in pst_layers(model).values() for flag in (~is_dropped(layer.pst_G)).tolist()]


def components_kept(model):
    """Open gates of each layer. Collective."""
    gates = [layer.pst_G for layer in pst_layers(model).values()]
    with torch.no_grad(), zero3.gathered([gate for gate in gates if zero3.is_released(gate)]):
        return [int((~is_dropped(gate)).sum()) for gate in gates]


def test_components_with_the_smallest_effect_go_first_and_stay_away():
    model = _model()
    order = sorted(range(15), key=_importances(model).__getitem__, reverse=True)
    for dropped, kept in ((0.5, 7), (0.75, 3)):
        stats = drop_components(model, dropped)
        assert _kept(model) == [i in order[:kept] for i in range(15)]
        assert stats.kept == tuple(components_kept(model))
        assert (stats.components, sum(stats.kept), stats.mean_update_rank) == (15, kept, kept / 5)
        for layer in pst_layers(model).values():
            layer.pst_U.data.mul_(torch.where(is_dropped(layer.pst_G), 100.0, 1.0))


@torch.no_grad()
def test_a_gate_of_a_layer_drops_its_whole_update():
    model = _model(update_gates="layer")
    norms = {}
    for name, layer in pst_layers(model).items():
        change = layer.pst_U @ layer.pst_V * 2 * torch.sigmoid(layer.pst_G)
        norms[name] = float(change.square().mean().sqrt() / layer.magnitude_scales[0])
    best = sorted(norms, key=norms.__getitem__)[-2:]
    assert drop_components(model, 0.6).kept == tuple(3 if name in best else 0 for name in norms)
    for name, layer in pst_layers(model).items():
        assert torch.equal(layer.masked_weight(), layer.weight) == (name not in best)


def test_masks_are_chosen_after_the_components():
    def masks(*, dropped_before):
        model = _model()
        if dropped_before:
            drop_components(model, 0.5)
        return update_masks(model, 0.6, dropped_share=None if dropped_before else 0.5)

    assert masks(dropped_before=True).checksum == masks(dropped_before=False).checksum
    assert masks(dropped_before=False).checksum != update_masks(_model(), 0.6).checksum
    assert masks(dropped_before=False).components == drop_components(_model(), 0.5)


def test_steps_leave_dropped_components_as_they_are():
    """With Adam's moments of before, in bf16 on fp32 masters."""
    model = _model(dtype=torch.bfloat16)
    optimizer = pst_optimizer(model, gate_learning_rate=0.5, update_learning_rate=0.1)
    ranks = CubicSchedule(
        num_steps=6, final_sparsity=0.6, warmup_fraction=0.2, cooldown_fraction=0.4, update_interval=1
    )
    updater = MaskUpdater(model, OneShotSchedule(0.5), rank_budget=ranks)
    before, kept = {}, []
    for _ in range(6):
        for layer in model.values():
            layer(torch.randn(4, layer.in_features, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.after_step(optimizer)
        kept.append(sum(_kept(model)))
        for name, layer in model.items():
            gone = is_dropped(layer.pst_G)
            now = layer.pst_G[gone].clone(), zero3.fp32_masters([layer.pst_G])[0][gone].clone()
            assert all(bool((values < -9000).all()) for values in now)
            assert bool((layer.state().factors.V[gone] == 0).all())
            before[name] = now
    assert kept[-1] == 6 == sum(updater.component_stats.kept)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 6


def test_a_loop_of_its_own_drops_along_its_schedule():
    model = _model(target_rank=1.2)
    schedule = CubicSchedule(num_steps=4, final_sparsity=0.5, warmup_fraction=0.0, cooldown_fraction=0.5)
    optimizer = pst_optimizer(model)
    updater = MaskUpdater(model, schedule)
    for _ in range(2):
        for layer in model.values():
            layer(torch.randn(4, layer.in_features)).square().mean().backward()
        optimizer.step()
        updater.after_step(optimizer)
    assert sum(_kept(model)) == 6
    with pytest.raises(InputError, match=r"OneShotSchedule has no ramp\. Give MaskUpdater rank_budget"):
        MaskUpdater(_model(target_rank=1.2), OneShotSchedule(0.5))


def test_a_budget_that_no_gate_fits_into_is_refused():
    with pytest.raises(InputError, match=r"target_rank = 0.1 keeps 0 of the 15 components of 5 .* at least 0.2"):
        _model(target_rank=0.1)
    with pytest.raises(InputError, match=r"target_rank = 0.5 keeps 2 of the 15 components .* over 3; .* at least 0.6"):
        _model(target_rank=0.5, update_gates="layer")
    with pytest.raises(ValueError, match=r"target_rank = 4\.0 is more than update_rank = 3"):
        _model(target_rank=4)
    with pytest.raises(ValueError, match=r"there are no gates\. Set update_gates"):
        _model(target_rank=2, update_gates="none")
    with pytest.raises(ValueError, match='Set update_gates = "none"'):
        _model(update_rank=0)
    with pytest.raises(InputError, match="no gates to drop components by"):
        MaskUpdater(_model(update_gates="none"), OneShotSchedule(0.5), rank_budget=OneShotSchedule(0.5))


def _updated(stage, world_size):
    """The gates that are open after an update of masks and ranks in bf16, and after a step; masters and mask."""
    model = _model(world_size if stage == 3 else 1, torch.bfloat16)
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 20} if stage == 3 else {})}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.1, "name": "all"}]
    engine = build_engine(model, groups, ds_config=config)
    masks = update_masks(engine.module, 0.4, dropped_share=0.6)
    found = [components_kept(engine.module), masks.checksum]
    for layer in pst_layers(engine.module).values():
        gates = zero3.fp32_masters([layer.pst_G])[0].clone()
        with zero3.gathered([layer.pst_G]):
            assert torch.equal(gates.bfloat16(), layer.pst_G.detach().bfloat16())
        found.append(is_dropped(gates).tolist())
    return found


@pytest.mark.zero3
def test_the_same_components_are_kept_on_1_2_and_3_ranks_and_at_every_stage(run_ranks):
    (alone,) = run_ranks(_updated, 1, 3, 1)
    assert sum(alone[0]) == 6
    for stage, world_size in ((3, 2), (3, 3), (2, 2), (0, 1)):
        for found in run_ranks(_updated, world_size, stage, world_size):
            assert found == alone, (stage, world_size)
