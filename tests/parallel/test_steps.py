"""Steps of engines and optimizers of all kinds, and the model inside its wrappers."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from pst_ds.parallel.steps import applied_steps, torch_optimizer, unwrapped


def test_an_engine_counts_its_own_steps():
    engine = SimpleNamespace(global_steps=9, skipped_steps=2)
    assert applied_steps(engine, 6) == applied_steps(engine, 7) == 7


def test_an_optimizer_s_steps_are_counted_unless_it_skipped_or_accumulates():
    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    assert applied_steps(adam, 4) == 5

    def accelerated(*, syncs, skipped):
        return SimpleNamespace(gradient_state=SimpleNamespace(sync_gradients=syncs), step_was_skipped=skipped)

    assert applied_steps(accelerated(syncs=True, skipped=False), 4) == 5
    assert applied_steps(accelerated(syncs=True, skipped=True), 4) == 4
    assert applied_steps(accelerated(syncs=False, skipped=False), 4) == 4


def test_the_innermost_optimizer_is_found_and_deepspeed_s_masters_are_noted():
    param, master = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)), torch.zeros(1)
    adam = torch.optim.AdamW([param])
    deepspeed_s = SimpleNamespace(optimizer=adam, fp16_groups=[[param]], fp32_groups=[[master]])
    engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=deepspeed_s))
    assert torch_optimizer(engine) is torch_optimizer(adam) is adam
    assert param.fp32_master is master


def test_wrappers_are_taken_off():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    class Compiled(nn.Module):
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

    model = nn.Linear(2, 2)
    assert unwrapped(Wrapper(Compiled(model))) is unwrapped(model) is model
