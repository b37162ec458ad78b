"""Masks in step with a schedule in a loop of one's own."""

from __future__ import annotations

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pst_ds.core.schedule import CubicSchedule, OneShotSchedule
from pst_ds.errors import InputError
from pst_ds.nn.config import PSTConfig
from pst_ds.nn.inject import inject_pst, pst_layers
from pst_ds.parallel.engine import LocalEngine
from pst_ds.train.mask_update import mask_stats
from pst_ds.train.mask_updater import MaskUpdater
from pst_ds.train.optimizer import pst_optimizer, pst_parameter_groups

SCHEDULE = CubicSchedule(
    final_sparsity=0.75, initial_sparsity=0.25, num_steps=10, warmup_fraction=0.1, cooldown_fraction=0.3,
    update_interval=2,
)  # fmt: skip


def _model(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))
    model.forward = lambda x: model[0][1](torch.tanh(model[0][0](x)))
    return inject_pst(model.to(dtype), PSTConfig(score_rank=2, update_rank=2, **settings))


def _backward(model, step, factor=1.0):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).to(model[0][0].weight.dtype)
    (factor * model(x).float().square().mean()).backward()


def _zeros(model):
    return [int((layer.masked_weight() == 0).sum()) for layer in pst_layers(model).values()]


def _scores_train(model):
    return {layer.scores_train for layer in pst_layers(model).values()}


def _expected(step):
    return [math.floor(SCHEDULE.sparsity_at(step) * 64)] * 2


@pytest.mark.parametrize("kind", ["torch", "engine"])
def test_masks_follow_the_schedule_and_are_fixed_at_its_end(kind):
    model = _model()
    engine = LocalEngine(model, pst_parameter_groups(model)) if kind == "engine" else None
    optimizer = pst_optimizer(model) if engine is None else engine.optimizer
    masks = MaskUpdater(model, SCHEDULE)
    assert _zeros(model) == _expected(0)
    assert masks.masks == mask_stats(model, flipped_here=(16, 16))
    checksums = [masks.masks.checksum]
    for step in range(1, 11):
        if engine is None:
            optimizer.zero_grad()
            _backward(model, step)
            optimizer.step()
        else:
            _backward(model, step)
            engine.step()
        new = masks.after_step(engine or optimizer)
        assert (new is not None) == SCHEDULE.updates_masks_at(step)
        assert _zeros(model) == _expected(step)
        assert _scores_train(model) == {not SCHEDULE.is_final(step)}
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert (rates["scores"] == 0.0) == SCHEDULE.is_final(step)
        assert rates["updates"] > 0.0
        checksums.append(masks.masks.checksum)
    assert checksums[7] == checksums[10] != checksums[6]


def test_skipped_steps_and_micro_batches_count_for_nothing():
    model = _model()
    engine = LocalEngine(model, pst_parameter_groups(model), gradient_accumulation_steps=2)
    masks = MaskUpdater(model, SCHEDULE)
    for number in range(12):
        _backward(model, number, factor=math.inf if number == 4 else 1.0)
        engine.step()
        masks.after_step(engine)
        assert masks.step == engine.global_steps - engine.skipped_steps
        assert _zeros(model) == _expected(masks.step)
    assert (masks.step, engine.skipped_steps) == (5, 1)


def test_an_optimizer_that_knows_of_skipped_steps_is_believed():
    model = _model()
    inner = pst_optimizer(model)
    wrapper = SimpleNamespace(
        optimizer=inner, gradient_state=SimpleNamespace(sync_gradients=True), step_was_skipped=False
    )
    masks = MaskUpdater(model, SCHEDULE)
    seen = []
    for syncs, skipped in [(False, False), (True, False), (True, True), (False, True), (True, False)]:
        wrapper.gradient_state.sync_gradients, wrapper.step_was_skipped = syncs, skipped
        masks.after_step(wrapper)
        seen.append(masks.step)
    assert seen == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("at", [3, 8])
@pytest.mark.parametrize("way", ["step", "state_dict"])
def test_a_loop_that_is_continued_goes_on_as_one_that_was_not(at, way):
    def train(model, optimizer, masks, steps):
        for step in steps:
            optimizer.zero_grad()
            _backward(model, step)
            optimizer.step()
            masks.after_step(optimizer)

    whole = _model()
    optimizer = pst_optimizer(whole)
    masks = MaskUpdater(whole, SCHEDULE)
    train(whole, optimizer, masks, range(1, at + 1))
    saved, saved_optimizer, state = dict(whole.state_dict()), deepcopy(optimizer.state_dict()), masks.state_dict()
    saved = {name: value.clone() for name, value in saved.items()}
    other = _model()
    other_optimizer = pst_optimizer(other)
    if way == "state_dict":
        other_masks = MaskUpdater(other, SCHEDULE)
    other.load_state_dict(saved)
    other_optimizer.load_state_dict(saved_optimizer)
    if way == "step":
        other_masks = MaskUpdater(other, SCHEDULE, step=at)
    else:
        other_masks.load_state_dict(state)
    assert other_masks.masks.checksum == masks.masks.checksum
    for args in ((whole, optimizer, masks), (other, other_optimizer, other_masks)):
        train(*args, range(at + 1, 11))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), other.parameters(), strict=True))


def test_an_updater_made_before_the_checkpoint_was_loaded_says_so():
    model = _model()
    engine = LocalEngine(model, pst_parameter_groups(model))
    masks = MaskUpdater(model, SCHEDULE)
    engine.global_steps = 5
    _backward(model, 0)
    engine.step()
    with pytest.raises(InputError, match=r"has applied 6 optimizer steps, and the masks are those of step 0"):
        masks.after_step(engine)


def test_a_mask_that_is_chosen_once():
    model = _model()
    masks = MaskUpdater(model, OneShotSchedule(0.5))
    assert _zeros(model) == [32, 32]
    assert _scores_train(model) == {False}
    checksum = masks.masks.checksum
    optimizer = pst_optimizer(model)
    _backward(model, 0)
    optimizer.step()
    assert masks.after_step(optimizer) is None
    assert mask_stats(model).checksum == checksum


def test_a_model_that_cannot_be_masked_is_refused():
    with pytest.raises(InputError, match=r"no PST layers; call inject_pst"):
        MaskUpdater(nn.Linear(2, 2), SCHEDULE)
    with pytest.raises(InputError, match=r'magnitude = "activation", but 0\.0 has no norms of its inputs; set them'):
        MaskUpdater(_model(magnitude="activation"), SCHEDULE)


def test_rates_are_the_run_file_s_unless_given():
    model = _model()
    groups = {group["name"]: group for group in pst_parameter_groups(model, update_learning_rate=0.5)}
    assert (groups["scores"]["lr"], groups["updates"]["lr"]) == (1e-2, 0.5)
    assert {group["weight_decay"] for group in groups.values()} == {0.0}
    assert groups["scores"]["betas"] == (0.9, 0.98)
    optimizer = pst_optimizer(model, score_learning_rate=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 1e-3]


def test_fp16_parameters_are_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"torch\.float16, which AdamW cannot train: load the model in torch\.float32"):
        pst_optimizer(_model(torch.float16))
