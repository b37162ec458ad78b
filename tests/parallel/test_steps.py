"""Steps of engines and optimizers of all kinds, and the model inside its wrappers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from pst_ds.parallel.steps import applied_steps, steps_noted, torch_optimizer, unwrapped


def test_an_engine_counts_its_own_steps():
    engine = SimpleNamespace(global_steps=9, skipped_steps=2)
    assert applied_steps(engine, 6, noted=0) == applied_steps(engine, 7, noted=0) == 7


def test_an_optimizer_s_steps_are_counted_unless_it_skipped_or_accumulates():
    adam, other = (torch.optim.AdamW([nn.Parameter(torch.zeros(1))]) for _ in range(2))
    adam.step()
    noted = steps_noted()
    other.step()
    assert applied_steps(adam, 4, noted=noted) == 4
    adam.step()
    assert applied_steps(adam, 4, noted=noted) == 5
    assert applied_steps(adam, 5, noted=steps_noted()) == 5
    assert applied_steps(SimpleNamespace(param_groups=[]), 4, noted=noted) == 5  # of another kind: it is believed

    def accelerated(*, syncs, skipped):
        return SimpleNamespace(gradient_state=SimpleNamespace(sync_gradients=syncs), step_was_skipped=skipped)

    assert applied_steps(accelerated(syncs=True, skipped=False), 4, noted=noted) == 5
    assert applied_steps(accelerated(syncs=True, skipped=True), 4, noted=noted) == 4
    assert applied_steps(accelerated(syncs=False, skipped=False), 4, noted=noted) == 4


def test_the_innermost_optimizer_is_found_and_deepspeed_s_masters_are_noted():
    param, master = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)), torch.zeros(1)
    adam = torch.optim.AdamW([param])
    deepspeed_s = SimpleNamespace(optimizer=adam, fp16_groups=[[param]], fp32_groups=[[master]])
    engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=deepspeed_s))
    assert torch_optimizer(engine) is torch_optimizer(adam) is adam
    assert param.fp32_master is master


def _process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)


def test_wrappers_are_taken_off(tmp_path):
    model = nn.Linear(2, 2)
    _process_group(tmp_path)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()
    assert unwrapped(torch.compile(parallel)) is unwrapped(torch.compile(model)) is unwrapped(model) is model
    assert unwrapped(nn.DataParallel(model)) is model


def test_what_a_model_calls_module_is_a_part_of_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    class Engine(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    model = Model()
    assert unwrapped(model) is unwrapped(Engine(Engine(model))) is model
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert unwrapped(averaged) is averaged.module
    averaged.pst_config = "injected as a whole"
    assert unwrapped(averaged) is averaged
