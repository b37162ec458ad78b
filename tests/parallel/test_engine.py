"""The engine of one process: accumulation, clipping, skipped steps, fp32 masters, and what its state weighs."""

from __future__ import annotations

import importlib
import math
import os
import sys

import pytest
import torch
from torch import nn

from pst_ds.errors import InputError
from pst_ds.parallel import sharding
from pst_ds.parallel.engine import LocalEngine, build_engine, import_muon_without_its_compiler, optimizer_bytes


class _Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)
        self.inner.bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, x, target):
        return nn.functional.mse_loss(self.head(torch.tanh(self.inner(x))).float(), target)


def _engine(model, **settings):
    groups = [
        {"params": [model.inner.weight], "lr": 1e-2, "name": "updates"},
        {"params": list(model.head.parameters()), "lr": 1e-3, "name": "head"},
    ]
    return LocalEngine(model, groups, **settings)


def _data(num=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 6, generator=generator), torch.randn(num, 3, generator=generator)


def _run(engine, x, target, num_pieces, steps=1):
    applied = []
    for _ in range(steps):
        for piece, wanted in zip(x.chunk(num_pieces), target.chunk(num_pieces), strict=True):
            engine.backward(engine(piece, wanted))
            engine.step()
            applied.append(engine.was_step_applied())
    return applied


def _values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("pieces", [2, 3, 4])
def test_accumulated_micro_batches_equal_one_big_batch(pieces):
    x, target = _data()
    whole, accumulated = _Model(), _Model()
    one = _engine(whole, gradient_clipping=0.05)
    many = _engine(accumulated, gradient_accumulation_steps=pieces, gradient_clipping=0.05)
    assert _run(one, x, target, 1, steps=3) == [True] * 3
    assert _run(many, x, target, pieces, steps=3) == ([False] * (pieces - 1) + [True]) * 3
    assert (one.global_steps, many.global_steps) == (3, 3)
    for name, value in _values(accumulated).items():
        torch.testing.assert_close(value, _values(whole)[name], rtol=1e-5, atol=1e-6)
    assert many.get_global_grad_norm() == pytest.approx(one.get_global_grad_norm(), rel=1e-5)
    assert not torch.equal(_values(whole)["head.weight"], _values(_Model())["head.weight"])
    assert torch.equal(whole.inner.bias, _Model().inner.bias)  # frozen


def test_a_step_is_adamw_s_without_weight_decay():
    x, target = _data()
    model, reference = _Model(), _Model()
    engine = _engine(model)
    adam = torch.optim.Adam(
        [{"params": [reference.inner.weight], "lr": 1e-2}, {"params": reference.head.parameters(), "lr": 1e-3}]
    )
    for _ in range(4):
        engine.backward(engine(x, target))
        engine.step()
        adam.zero_grad()
        reference(x, target).backward()
        adam.step()
    for name, value in _values(model).items():
        torch.testing.assert_close(value, _values(reference)[name], rtol=1e-6, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def _sgd_step(clipping):
    """The change of every parameter for one plain gradient step, and the gradients themselves."""
    x, target = _data()
    model = _Model()
    before = _values(model)
    engine = _engine(model, gradient_clipping=clipping)
    engine.optimizer.step = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0).step
    grads = torch.autograd.grad(model(x, target), [p for p in model.parameters() if p.requires_grad])
    engine.backward(engine(x, target))
    engine.step()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    change = [before[n] - _values(model)[n] for n in trained]
    return change, grads, engine.get_global_grad_norm()


def test_clipping_scales_the_global_norm():
    _, grads, reported = _sgd_step(0.0)
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert reported == pytest.approx(norm)
    limit = norm / 3
    change, grads, reported = _sgd_step(limit)
    assert reported == pytest.approx(norm)  # before clipping, as DeepSpeed reports it
    for moved, grad in zip(change, grads, strict=True):
        torch.testing.assert_close(moved, grad * limit / norm, rtol=1e-4, atol=1e-6)
    for clipping in (0.0, norm * 2):  # 0 is off; a norm below the limit is left alone
        for moved, grad in zip(*_sgd_step(clipping)[:2], strict=True):
            torch.testing.assert_close(moved, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_skips_the_step(bad):
    x, target = _data()
    model = _Model()
    engine = _engine(model, gradient_accumulation_steps=2, gradient_clipping=1.0)
    assert _run(engine, x, target, 2) == [False, True]
    before, spoilt = _values(model), x.clone()
    state = [s["exp_avg"].clone() for s in engine.optimizer.state.values()]
    spoilt[0, 0] = bad
    assert _run(engine, spoilt, target, 2) == [False, False]
    assert (engine.global_steps, engine.skipped_steps) == (2, 1)
    assert all(torch.equal(value, before[name]) for name, value in _values(model).items())
    assert all(torch.equal(s["exp_avg"], o) for s, o in zip(engine.optimizer.state.values(), state, strict=True))
    assert _run(engine, x, target, 2) == [False, True]  # nothing of the bad gradient is left
    assert all(bool(value.isfinite().all()) for value in _values(model).values())


def test_bf16_parameters_have_fp32_masters_that_small_steps_add_up_in():
    x, target = _data()
    model = _Model(torch.bfloat16)
    engine = _engine(model)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-5  # far below half a unit in the last place of bf16
    start = model.head.weight.detach().clone()
    for _ in range(20):
        engine.backward(engine(x.bfloat16(), target))
        engine.step()
    wide = _engine(_Model())
    _run(wide, x, target, 1)
    assert engine.get_global_grad_norm() == pytest.approx(wide.get_global_grad_norm(), rel=0.05)
    (master,) = sharding.fp32_masters([model.head.weight])
    assert master.dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16
    assert not torch.equal(master, start.float())
    assert float((master - start.float()).abs().max()) == pytest.approx(20e-5, rel=0.2)
    assert torch.equal(model.head.weight, master.bfloat16())


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 8), (torch.bfloat16, 12)])
def test_optimizer_bytes_are_two_moments_and_the_masters_kept_apart(dtype, bytes_each):
    model = _Model(dtype)
    engine = _engine(model)
    x, target = _data()
    _run(engine, x.to(dtype), target, 1)
    trained = 6 * 5 + 5 * 3 + 3  # not the frozen bias
    assert optimizer_bytes(engine) == trained * bytes_each


def test_mixed_dtypes_among_the_trained_are_refused_by_name():
    model = _Model()
    model.head.bfloat16()
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": 1.0, "name": "all"}]
    for config in (None, {"train_micro_batch_size_per_gpu": 1}):
        with pytest.raises(InputError) as caught:
            build_engine(model, groups, ds_config=config)
        assert "mix torch.bfloat16, torch.float32; load the whole model in one dtype" in str(caught.value)


def test_build_engine_without_a_config_passes_its_numbers_on():
    model = _Model()
    groups = [{"params": [model.head.weight], "lr": 1.0, "name": "head"}]
    engine = build_engine(model, groups, ds_config=None, gradient_accumulation_steps=3, gradient_clipping=0.5)
    assert isinstance(engine, LocalEngine)
    x, target = _data()
    assert _run(engine, x, target, 3) == [False, False, True]
    assert [group["name"] for group in engine.optimizer.param_groups] == ["head"]


def test_train_and_eval_reach_the_module():
    engine = _engine(_Model())
    assert engine.eval() is engine
    assert not engine.module.training
    assert engine.train() is engine
    assert engine.module.head.training


@pytest.mark.parametrize("setting", [None, "0"])
def test_muon_is_imported_uncompiled_and_torch_s_compiler_left_as_it_was(monkeypatch, setting):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if setting is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", setting)
    package = importlib.import_module("deepspeed.runtime.zero.muon")
    monkeypatch.delattr(package, "original_muon", raising=False)
    monkeypatch.delitem(sys.modules, "deepspeed.runtime.zero.muon.original_muon", raising=False)
    import_muon_without_its_compiler()
    assert os.environ.get("TORCHDYNAMO_DISABLE") == setting
    update = sys.modules["deepspeed.runtime.zero.muon.original_muon"].muon_update
    assert not hasattr(update, "__wrapped__")  # as torch.compile leaves it
