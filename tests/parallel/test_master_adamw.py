"""AdamW on fp32 masters: its steps, what it saves, and values that somebody else gave the parameters."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from pst_ds.parallel import sharding
from pst_ds.parallel.master_adamw import MasterAdamW

RATE = 1e-3


def _layer(dtype):
    torch.manual_seed(0)
    return nn.Linear(6, 5).to(dtype)


def _optimizer(layer):
    return MasterAdamW([{"params": [layer.weight], "lr": RATE, "name": "a"}, {"params": [layer.bias], "lr": 2 * RATE}])


def _backward(layer, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, generator=generator).to(layer.weight.dtype)
    layer(x).float().square().sum().backward()


def _train(layer, optimizer, seeds):
    for seed in seeds:
        optimizer.zero_grad()
        _backward(layer, seed)
        optimizer.step()


def _masters(layer):
    return [master.clone() for master in sharding.fp32_masters(list(layer.parameters()))]


def test_bf16_steps_are_those_of_adamw_on_fp32_copies():
    """Gradients are the bf16 model's; everything after is fp32."""
    layer, reference = _layer(torch.bfloat16), _layer(torch.bfloat16)
    optimizer = _optimizer(layer)
    copies = [nn.Parameter(p.detach().float()) for p in reference.parameters()]
    adam = torch.optim.AdamW(
        [{"params": [copies[0]], "lr": RATE}, {"params": [copies[1]], "lr": 2 * RATE}], weight_decay=0
    )
    for seed in range(5):
        _train(layer, optimizer, [seed])
        reference.zero_grad()
        _backward(reference, seed)
        for copy, param in zip(copies, reference.parameters(), strict=True):
            copy.grad = param.grad.float()
        adam.step()
        for copy, param in zip(copies, reference.parameters(), strict=True):
            param.data = copy.detach().bfloat16()
    assert all(torch.equal(one, other) for one, other in zip(_masters(layer), copies, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), reference.parameters(), strict=True))
    assert [group["params"] for group in optimizer.param_groups] == [[layer.weight], [layer.bias]]
    assert all(p.grad is None for p in layer.parameters())


def test_fp32_parameters_are_trained_by_plain_adamw():
    layer, reference = _layer(torch.float32), _layer(torch.float32)
    optimizer = _optimizer(layer)
    adam = torch.optim.AdamW(
        [{"params": [reference.weight], "lr": RATE}, {"params": [reference.bias], "lr": 2 * RATE}], weight_decay=0.0
    )
    _train(layer, optimizer, range(4))
    _train(reference, adam, range(4))
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), reference.parameters(), strict=True))
    assert "masters" not in optimizer.state_dict()
    assert optimizer.masters() == [layer.weight, layer.bias]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_goes_on_to_the_same_bits(dtype):
    whole = _layer(dtype)
    _train(whole, _optimizer(whole), range(6))
    first, second = _layer(dtype), _layer(dtype)
    optimizer = _optimizer(first)
    _train(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = _optimizer(second)
    second.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert [group["params"] for group in again.param_groups] == [[second.weight], [second.bias]]
    assert again.param_groups[0]["name"] == "a"
    _train(second, again, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(_masters(second), _masters(whole), strict=True))


def test_a_parameter_that_was_given_other_values_begins_anew_from_them():
    """As load_state_dict of the model alone does: a stale master must not undo it, nor be saved in its place."""
    layer = _layer(torch.bfloat16)
    optimizer = _optimizer(layer)
    _train(layer, optimizer, [0])
    assert not torch.equal(_masters(layer)[0], layer.weight.float())
    with torch.no_grad():
        layer.weight.fill_(3.0)
    assert torch.equal(_masters(layer)[0], torch.full((5, 6), 3.0))
    _train(layer, optimizer, [1])
    assert float((_masters(layer)[0] - 3.0).abs().max()) < 10 * RATE


@pytest.mark.parametrize("copied", [deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_of_model_and_optimizer_goes_on_to_the_same_bits(copied):
    layer = _layer(torch.bfloat16)
    optimizer = _optimizer(layer)
    _train(layer, optimizer, range(3))
    before = _masters(layer)
    other, others = copied((layer, optimizer))
    assert all(torch.equal(one, two) for one, two in zip(_masters(other), before, strict=True))
    _train(other, others, range(3, 6))
    assert all(torch.equal(one, two) for one, two in zip(_masters(layer), before, strict=True))
    _train(layer, optimizer, range(3, 6))
    assert all(torch.equal(one, two) for one, two in zip(_masters(layer), _masters(other), strict=True))


@pytest.mark.gpu
def test_masters_made_before_the_model_moved_train_on():
    layer, moved = _layer(torch.bfloat16), _layer(torch.bfloat16).cuda()
    optimizer, other = _optimizer(layer), _optimizer(moved)
    before = [master.detach().clone() for master in optimizer.masters()]
    layer.cuda()
    assert all(torch.equal(master.cpu(), b) for master, b in zip(optimizer.masters(), before, strict=True))
    for one, its in ((layer, optimizer), (moved, other)):
        one(torch.ones(1, 6, device="cuda", dtype=torch.bfloat16)).float().square().sum().backward()
        its.step()
    assert all(torch.equal(one, two) for one, two in zip(_masters(layer), _masters(moved), strict=True))


def test_zero_grad_forgets_gradients_that_were_taken():
    layer = _layer(torch.bfloat16)
    optimizer = _optimizer(layer)
    _backward(layer, 0)
    masters = optimizer.take_gradients()
    assert all(p.grad is None for p in layer.parameters())
    assert all(m.grad.dtype == torch.float32 for m in masters)
    optimizer.zero_grad()
    before = _masters(layer)
    optimizer.step()
    assert all(m.grad is None for m in masters)
    assert all(torch.equal(one, other) for one, other in zip(_masters(layer), before, strict=True))


def test_a_closure_gives_the_loss():
    layer = _layer(torch.bfloat16)
    optimizer = _optimizer(layer)

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 6, dtype=torch.bfloat16)).float().square().sum()
        loss.backward()
        return loss

    before, expected = _masters(layer), closure().detach()
    assert torch.equal(optimizer.step(closure).detach(), expected)
    assert not torch.equal(_masters(layer)[0], before[0])
