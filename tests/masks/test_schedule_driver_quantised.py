"""Rounding in a loop of one's own: when it begins, and that what is saved computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pst_ds import (
    CubicSchedule,
    Grid,
    MaskUpdater,
    OneShotSchedule,
    PSTConfig,
    RoundingSchedule,
    adapter_checkpoints,
    inject_pst,
    load_pretrained,
    merge_and_unload,
    pst_optimizer,
    save_pretrained,
)
from pst_ds.checkpoint.adapter import PretrainedError
from pst_ds.core.quantization import Rounding
from pst_ds.errors import InputError
from pst_ds.nn.inject import pst_layers
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import build_engine

STEPS = 6
MASKS = CubicSchedule(final_sparsity=0.5, num_steps=STEPS, warmup_fraction=0.2, cooldown_fraction=0.7)
ROUNDING = RoundingSchedule(start=2, interval=3, num_steps=STEPS)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList([nn.Linear(32, 64), nn.Linear(64, 32)])

    def forward(self, x):
        return self.blocks[1](torch.tanh(self.blocks[0](x)))


def _injected(grid: Grid | None = Grid(4, 32), num_shards: int = 1):  # noqa: B008  immutable
    config = PSTConfig(score_rank=2, update_rank=2, modules_to_save=())
    return inject_pst(_Model(), config, grid=grid, num_shards=num_shards)


def _trained(steps: int = STEPS):
    model = _injected()
    optimizer, rounds = pst_optimizer(model, update_learning_rate=0.05), []
    masks = MaskUpdater(model, MASKS, rounding=ROUNDING)
    searched = []
    for step in range(1, steps + 1):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = masks.rounding_stats
        masks.after_step(optimizer)
        rounds.append({layer.rounds for layer in pst_layers(model).values()})
        if masks.rounding_stats is not before:
            searched.append(step)
    return model, rounds, searched


def _weights(model):
    return {name: layer.masked_weight().detach() for name, layer in pst_layers(model).items()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_weights_are_rounded_from_the_start_of_the_schedule():
    model, rounds, searched = _trained()
    assert rounds == [{False}, *[{True}] * 5]
    assert searched == [2, 5]
    for layer in pst_layers(model).values():
        codes, _ = Rounding(layer.stored_grid, layer.rounding().scales).codes(layer.masked_weight().detach())
        assert set(codes.unique().tolist()) <= set(range(-8, 8))


def test_an_updater_that_goes_on_rounds_as_its_step_says():
    model, _, _ = _trained()
    MaskUpdater(model, MASKS, step=1, rounding=ROUNDING)
    assert not any(layer.rounds for layer in pst_layers(model).values())
    MaskUpdater(model, MASKS, step=3, rounding=ROUNDING)
    assert all(layer.rounds for layer in pst_layers(model).values())


def test_with_masks_that_are_there_weights_are_rounded_before_the_first_step():
    model = _injected()
    masks = MaskUpdater(model, OneShotSchedule(0.5), rounding=RoundingSchedule(0, 1, 3))
    assert 0.02 < masks.rounding_stats.error < 0.2
    assert all(layer.rounds for layer in pst_layers(model).values())


def test_rounding_without_a_grid_or_on_the_ramp_is_refused():
    with pytest.raises(InputError, match=r"Call inject_pst with grid=Grid\(bits=4, group=64\)"):
        MaskUpdater(_injected(None), MASKS, rounding=ROUNDING)
    with pytest.raises(InputError, match=r"rounding.start = 1 is before the schedule's last mask update"):
        MaskUpdater(_injected(), MASKS, rounding=RoundingSchedule(1, 1, STEPS))
    with pytest.raises(ValueError, match=r"start = 6 must be in \[0, num_steps = 6\)"):
        RoundingSchedule(STEPS, 1, STEPS)
    with pytest.raises(ValueError, match="interval = 0 must be at least 1"):
        RoundingSchedule(0, 0, STEPS)


def test_what_is_saved_and_merged_computes_with_rounded_weights(tmp_path):
    model, _, _ = _trained()
    save_pretrained(model, tmp_path)
    for other in (load_pretrained(_Model(), tmp_path), load_pretrained(_injected(), tmp_path)):
        assert _same(_weights(other), _weights(model))
        assert all(layer.rounds for layer in pst_layers(other).values())
    for grid in (None, Grid(8, 32)):
        with pytest.raises(PretrainedError, match="has grid = int4, a scale for 32 inputs, and the model was injected"):
            load_pretrained(_injected(grid), tmp_path)
    expected = _weights(model)
    merged = merge_and_unload(model)
    assert all(torch.equal(merged.get_submodule(name).weight, weight) for name, weight in expected.items())


def test_state_dicts_have_the_scales():
    model, _, _ = _trained()
    adapter_checkpoints(model)
    state = model.state_dict()
    scales = {name for name in state if name.endswith("pst_scales")}
    assert len(scales) == 2
    other = _injected()
    adapter_checkpoints(other)
    other.load_state_dict(state)
    MaskUpdater(other, MASKS, step=STEPS, rounding=ROUNDING)
    assert _same(_weights(other), _weights(model))
    for wrong in ("pst_scales", "pst_scales_shard"):
        less = {name: value for name, value in state.items() if name not in scales}
        with pytest.raises(RuntimeError, match=rf"blocks.0.{wrong} has 3 bytes, not \d+\. Load it"):
            other.load_state_dict(less | {f"blocks.0.{wrong}": torch.zeros(3, dtype=torch.uint8)})


def _state_of_rank(world_size):
    """A state dict of this rank under ZeRO-3 goes into a model of as many ranks."""
    state, found = {}, []
    for load in (False, True):
        model = _injected(num_shards=world_size)
        adapter_checkpoints(model)
        groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 0.0, "name": "all"}]
        zero = {"stage": 3, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
        engine = build_engine(model, groups, ds_config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})
        if load:
            engine.module.load_state_dict(state, strict=False)
        else:
            MaskUpdater(engine.module, OneShotSchedule(0.5), rounding=RoundingSchedule(0, 1, 3))
            state = {name: value for name, value in engine.module.state_dict().items() if "pst_scales" in name}
        whole = []
        for layer in pst_layers(engine.module).values():
            with sharding.gathered([layer.pst_scales]):
                whole.append(layer.rounding().scales.clone())
        found.append(whole)
    return sorted(state), found


@pytest.mark.zero3
def test_state_dicts_of_ranks_have_their_scales(run_ranks):
    for names, (before, after) in run_ranks(_state_of_rank, 2, 2):
        assert names == ["blocks.0.pst_scales_shard", "blocks.1.pst_scales_shard"]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert all(bool((one != 1.0).all()) for one in before)
