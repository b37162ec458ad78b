"""What pst-ds changes in DeepSpeed is as before once the engine or the model is done with."""

from __future__ import annotations

import copy
import gc
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from pst_ds.parallel.engine import build_engine, keep_frozen, omit_frozen, release, time_waits

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def _timed_and_released():
    model = nn.Linear(4, 4)
    groups = [{"params": list(model.parameters()), "lr": 1e-3, "name": "all"}]
    engine = build_engine(model, groups, ds_config=CONFIG)
    coordinator = engine.optimizer.parameter_offload.param_coordinator
    counts = {"first": 0, "second": 0}

    @contextmanager
    def timing(name):
        counts[name] += 1
        yield

    time_waits(engine, lambda: timing("first"))
    time_waits(engine, lambda: timing("second"))  # takes the place of the first
    engine.backward(engine(torch.ones(4, 4)).sum())
    engine.step()
    changed = "allreduce_gradients" in vars(engine), "fetch_sub_module" in vars(coordinator)
    release(engine)
    left = "allreduce_gradients" in vars(engine), "fetch_sub_module" in vars(coordinator)
    return counts["first"], counts["second"] > 0, changed, left


@pytest.mark.zero3
def test_the_waits_of_an_engine_are_timed_until_it_is_released(run_ranks):
    for outcome in run_ranks(_timed_and_released, 2):
        assert outcome == (0, True, (True, True), (False, False))


@pytest.mark.usefixtures("imported_by_ranks")
def test_frozen_parameters_are_omitted_while_a_model_asks_for_it():
    from deepspeed import DeepSpeedEngine

    gc.collect()  # models of other tests
    before = vars(DeepSpeedEngine)["save_checkpoint"]
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for model in (one, other):
        omit_frozen(model)
        omit_frozen(model)  # a second time changes nothing
    copied = copy.deepcopy(one)
    assert vars(DeepSpeedEngine)["save_checkpoint"] is not before
    keep_frozen(one)
    keep_frozen(other)
    assert vars(DeepSpeedEngine)["save_checkpoint"] is not before
    del copied, model
    gc.collect()
    assert vars(DeepSpeedEngine)["save_checkpoint"] is before
