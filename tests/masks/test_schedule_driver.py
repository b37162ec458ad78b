"""Masks in step with a schedule in a loop of one's own."""

from __future__ import annotations

import math
import re
import warnings
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from pst_ds.config.pst import Override, PSTConfig
from pst_ds.core.schedule import CubicSchedule, OneShotSchedule
from pst_ds.errors import InputError
from pst_ds.masks.schedule_driver import MaskUpdater, _require_called
from pst_ds.masks.update import mask_stats
from pst_ds.nn.inject import inject_pst, layers_never_called, pst_layers
from pst_ds.nn.optimizer import pst_optimizer, pst_parameter_groups
from pst_ds.parallel.engine import LocalEngine
from pst_ds.parallel.ranks import rank
from tests.pairs import every_pair

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
    assert masks.masks == replace(mask_stats(model), num_flipped=32, flipped=(16, 16))
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


@pytest.mark.parametrize("resumed", [False, True])
def test_one_layer_is_pruned_along_the_ramp_while_the_other_stays_dense(resumed):
    schedule = CubicSchedule(
        final_sparsity=0.0, num_steps=10, warmup_fraction=0.1, cooldown_fraction=0.3, update_interval=1
    )
    model = _model(overrides=(Override(modules=("1",), final_sparsity=0.5),))
    optimizer = pst_optimizer(model)
    masks = MaskUpdater(model, schedule)
    for step in range(1, 11):
        optimizer.zero_grad()
        _backward(model, step)
        optimizer.step()
        masks.after_step(optimizer)
        left = 1.0 - min(max(step - 1, 0), 6) / 6
        assert _zeros(model) == [0, math.floor(0.5 * 64 * (1.0 - left**3))]
        if resumed:
            masks = MaskUpdater(model, schedule, step=step)
    assert _zeros(model) == [0, 32]
    assert _scores_train(model) == {False}


def test_one_layer_is_pruned_at_once_while_the_other_stays_dense():
    model = _model(overrides=(Override(modules=("1",), final_sparsity=0.5),))
    MaskUpdater(model, OneShotSchedule(0.0))
    assert _zeros(model) == [0, 32]


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
    _backward(model, 0)
    seen = []
    for syncs, skipped in [(False, False), (True, False), (True, True), (False, True), (True, False)]:
        wrapper.gradient_state.sync_gradients, wrapper.step_was_skipped = syncs, skipped
        masks.after_step(wrapper)
        seen.append(masks.step)
    assert seen == [0, 1, 1, 1, 2]


def test_micro_batches_without_a_step_of_torch_s_optimizer_count_for_nothing():
    model, other = _model(), _model()
    optimizer, others = pst_optimizer(model), torch.optim.AdamW(other.parameters())
    _backward(model, 99)
    optimizer.step()  # before there is an updater
    masks = MaskUpdater(model, SCHEDULE)
    seen = []
    for number in range(7):
        _backward(model, number)
        others.step()
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        masks.after_step(optimizer)
        seen.append(masks.step)
    assert seen == [0, 0, 1, 1, 1, 2, 2]
    masks.load_state_dict({"step": 5})
    masks.after_step(optimizer)
    assert masks.step == 5


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_loss_scaler_skips_counts_for_nothing(fused):
    model = _model()
    optimizer = torch.optim.AdamW(pst_parameter_groups(model), fused=fused)
    masks = MaskUpdater(model, SCHEDULE)
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=4.0), []
    for number in range(4):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(number)) * (math.inf if number == 1 else 1.0)
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        masks.after_step(optimizer)
        seen.append(masks.step)
    assert seen == [1, 1, 2, 3]


def _train(model, optimizer, masks, steps):
    for step in range(steps):
        optimizer.zero_grad()
        _backward(model, step)
        optimizer.step()
        masks.after_step(optimizer)


@pytest.mark.parametrize("way", ["another schedule", "a step further back"])
def test_scores_train_again_after_masks_that_were_final(way):
    model = _model()
    optimizer = pst_optimizer(model)
    masks = MaskUpdater(model, SCHEDULE)
    _train(model, optimizer, masks, 10)
    assert _scores_train(model) == {False}
    if way == "another schedule":
        again = CubicSchedule(final_sparsity=0.875, initial_sparsity=0.75, num_steps=10)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            masks = MaskUpdater(model, again)
    else:
        masks.load_state_dict({"step": 0})
    assert _scores_train(model) == {True}
    before = [layer.pst_B.clone() for layer in pst_layers(model).values()]
    _train(model, optimizer, masks, 2)
    assert not any(torch.equal(b, layer.pst_B) for b, layer in zip(before, pst_layers(model).values(), strict=True))
    assert optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["peak_lr"]
    _train(model, optimizer, masks, 8)
    assert _scores_train(model) == {False}


def test_a_schedule_that_begins_below_the_masks_sparsity_is_warned_of():
    model = _model()
    MaskUpdater(model, OneShotSchedule(0.5))
    with pytest.warns(UserWarning, match=r"sparsity of 0\.5, .* starts at 0\.25: .* initial_sparsity = 0\.5 to"):
        MaskUpdater(model, SCHEDULE)
    MaskUpdater(model, OneShotSchedule(0.5))
    with pytest.warns(UserWarning, match=r"and the schedule starts at 0: pruned weights are restored"):
        MaskUpdater(model, CubicSchedule(final_sparsity=0.75, num_steps=10))


@every_pair
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
    with pytest.raises(InputError, match=r"has applied 6 optimizer steps, but the masks are at step 0"):
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


def _with_zeros():
    """A model that was pruned, one layer more than the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]))
    model.forward = lambda x: model[0][1](torch.tanh(model[0][0](x)))
    for layer, zeros in zip(model[0], (16, 48), strict=True):
        layer.weight.data.view(-1)[:zeros] = 0.0
    return inject_pst(model, PSTConfig(initial_mask="zeros", score_rank=0, structured_scores=False))


def test_the_zeros_of_the_base_model_are_kept():
    model = _with_zeros()
    kept = [layer.weight != 0 for layer in pst_layers(model).values()]
    optimizer = pst_optimizer(model)
    masks = MaskUpdater(model, OneShotSchedule(final_sparsity=0.5))
    for step in range(3):
        assert all(map(torch.equal, (layer.masked_weight() != 0 for layer in pst_layers(model).values()), kept))
        optimizer.zero_grad()
        _backward(model, step)
        optimizer.step()
        assert masks.after_step(optimizer) is None
    assert masks.masks.sparsity == 0.5


def test_zeros_that_a_schedule_would_not_keep_are_refused():
    with pytest.raises(InputError, match=r'initial_mask = "zeros": CubicSchedule .* OneShotSchedule\(final_sparsity'):
        MaskUpdater(_with_zeros(), SCHEDULE)
    with pytest.raises(InputError, match=r"final_sparsity = 0\.9, but 0\.5000 of the pruned weights are zero"):
        MaskUpdater(_with_zeros(), OneShotSchedule(final_sparsity=0.9))


def test_a_model_that_cannot_be_masked_is_refused():
    with pytest.raises(InputError, match=r"no PST layers; call inject_pst"):
        MaskUpdater(nn.Linear(2, 2), SCHEDULE)
    with pytest.raises(InputError, match=r"called on a part of this Sequential, .* name the part by target_modules"):
        MaskUpdater(nn.Sequential(_model(), nn.Linear(8, 2)), SCHEDULE)
    with pytest.raises(InputError, match=r'magnitude = "activation", but 0\.0 has no norms of its inputs. Set them'):
        MaskUpdater(_model(magnitude="activation"), SCHEDULE)


def test_what_is_no_schedule_is_refused_by_what_it_lacks():
    with pytest.raises(InputError, match="SimpleNamespace is not a schedule: it lacks progress_at, is_final"):
        MaskUpdater(_model(), SimpleNamespace(final_sparsity=0.5, sparsity_at=min, updates_masks_at=bool))


def test_rates_are_the_run_file_s_unless_given():
    model = _model()
    groups = {group["name"]: group for group in pst_parameter_groups(model, update_learning_rate=0.5)}
    assert (groups["scores"]["lr"], groups["updates"]["lr"]) == (1e-2, 0.5)
    assert {group["weight_decay"] for group in groups.values()} == {0.0}
    assert groups["scores"]["betas"] == (0.9, 0.98)
    optimizer = pst_optimizer(model, score_learning_rate=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 2e-3]
    shorter = {group["name"]: group["lr"] for group in pst_parameter_groups(model, num_steps=300)}
    assert shorter["updates"] == pytest.approx(2e-3 * 2 ** (1 / 3))


def test_fp16_parameters_are_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"torch\.float16, which AdamW cannot train: load the model in torch\.float32"):
        pst_optimizer(_model(torch.float16))


class _Reader(nn.Module):
    """In training it multiplies with the weight of a layer without calling it, as Gemma-3n and Mamba do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x):
        y = self.blocks[0](x)
        return y @ self.blocks[1].weight.t() if self.training else self.blocks[1](y)


def _step(model):
    model.eval()(torch.randn(4, 8))
    optimizer, masks = pst_optimizer(model), MaskUpdater(model, SCHEDULE)
    model.train()(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    masks.after_step(optimizer)
    return masks.step == 1


def test_layers_that_are_read_and_never_called_are_refused():
    torch.manual_seed(0)
    model = inject_pst(_Reader(), PSTConfig(exclude_modules=("head",)))
    assert layers_never_called(model) == ["blocks.0", "blocks.1"]
    fix = re.escape('called 1 of 2 pruned layers, and not blocks.1: ') + '.*' + re.escape(
        'exclude_modules = ["head", "blocks.1"], or prune them all the same with prune_uncalled = true'
    )  # fmt: skip
    with pytest.raises(InputError, match=fix):
        _step(model)
    assert layers_never_called(model) == ["blocks.1"]
    with pytest.raises(InputError, match=re.escape(r'exclude_modules = "no+e|(.*\\.)?(blocks\\.1)(\\..*)?"')):
        _step(inject_pst(_Reader(), PSTConfig(exclude_modules="no+e")))
    for fixed in (
        PSTConfig(exclude_modules=("head", "blocks.1")),
        PSTConfig(exclude_modules=r"no+e|(.*\.)?(blocks\.1)(\..*)?"),
        PSTConfig(prune_uncalled=True),
    ):
        assert _step(inject_pst(_Reader(), fixed))


class _Experts(nn.Module):
    """Blocks of experts, of which one in each gets the tokens, and a tower that gets none."""

    def __init__(self, chosen):
        super().__init__()
        self.chosen = chosen
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(_Expert() for _ in range(3))}) for _ in "ab"
        )
        self.tower = nn.ModuleDict({"blocks": nn.ModuleList(_Expert() for _ in range(2))})

    def forward(self, x):
        for block in self.blocks:
            x = x + block["experts"][self.chosen].up(x)
        return x


class _Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)


def test_an_expert_without_tokens_is_not_refused_and_a_tower_is():
    with pytest.raises(InputError, match=r"called 6 of 8 pruned layers, and not tower\.blocks\.0\.up.*= \[.tower.\]"):
        _step(inject_pst(_Experts(1), PSTConfig()))
    model = inject_pst(_Experts(1), PSTConfig(exclude_modules=("tower",)))
    assert _step(model)
    assert len(layers_never_called(model)) == 4
    with pytest.raises(InputError, match=r"called 0 of 6 .*exclude_modules = \[.tower., .blocks.\]"):
        _require_called(inject_pst(_Experts(1), PSTConfig(exclude_modules=("tower",))))


def test_a_block_that_layerdrop_left_out_is_not_refused():
    model = inject_pst(_Reader(), PSTConfig())
    model.config = PretrainedConfig(encoder_layerdrop=0.1)
    assert _step(model)


def _steps_of_a_rank():
    torch.manual_seed(0)
    model = _Reader()
    model.forward = lambda x: model.blocks[rank()](x)
    return _step(inject_pst(model, PSTConfig()))


@pytest.mark.zero3
def test_a_layer_that_another_rank_called_is_not_refused(run_ranks):
    assert run_ranks(_steps_of_a_rank, 2) == [True, True]
