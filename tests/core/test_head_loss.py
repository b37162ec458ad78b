"""The loss from hidden states, against logits that autograd sees whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from pst_ds.core.distillation import distilled_loss
from pst_ds.core.head_loss import ChunkSizes, Readout, Teacher, chunk_sizes, head_loss, token_losses
from tests.pairs import every_pair

SMALL = ChunkSizes(least_rows=4, numbers=1, numbers_in_fp32=3 * 37)
"""Of 37 classes, products of 4 rows, blocks of 3: neither divides the number of targets."""
READOUTS = {"plain": {}, "scaled": {"scale": 0.125}, "capped": {"cap": 3.0}, "both": {"scale": 2.0, "cap": 5.0}}


def _case(bias=True, dtype=torch.float64, **more):
    torch.manual_seed(3)
    hidden = torch.randn(23, 11, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 11, dtype=dtype, requires_grad=True)
    offsets = torch.randn(37, dtype=dtype, requires_grad=True) if bias else None
    rows = torch.randperm(23)[:18]
    targets = torch.randint(37, (18,))
    return hidden, Readout(weight, offsets, **more), targets, rows


def _logits(hidden, readout):
    logits = linear(hidden, readout.weight, readout.bias) * readout.scale
    return readout.cap * torch.tanh(logits / readout.cap) if readout.cap else logits


def _gradients(loss, tensors):
    return torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None])


def _assert_near(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance


@every_pair
@pytest.mark.parametrize("kind", READOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_whole_logits(kind, bias):
    hidden, readout, targets, rows = _case(bias, torch.float32, **READOUTS[kind])
    parts = (hidden, readout.weight, readout.bias)
    expected = cross_entropy(_logits(hidden, readout)[rows], targets)
    loss = head_loss(hidden, readout, targets, rows, sizes=SMALL)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    _assert_near(_gradients(3 * loss, parts), _gradients(3 * expected, parts), 1e-6)


@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.25, 2.0)])
def test_a_teacher_counts_as_it_does_on_whole_logits(weight, temperature):
    hidden, readout, targets, rows = _case(dtype=torch.float32, cap=6.0)
    other_hidden = torch.randn(23, 5)
    other = Readout(torch.randn(37, 5), None, scale=0.5)
    parts = (hidden, readout.weight, readout.bias)
    taught = _logits(other_hidden, other)[rows]
    expected = distilled_loss(_logits(hidden, readout)[rows], taught, targets, weight, temperature)
    teacher = Teacher(other_hidden, other, weight, temperature)
    loss = head_loss(hidden, readout, targets, rows, teacher=teacher, sizes=SMALL)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    _assert_near(_gradients(loss, parts), _gradients(expected, parts), 2e-6)


def test_a_frozen_head_has_no_gradient_and_every_token_may_count():
    hidden, readout, *_ = _case()
    frozen = replace(readout, weight=readout.weight.detach(), bias=None)
    targets = torch.randint(37, (23,))
    loss = head_loss(hidden, frozen, targets, sizes=SMALL)
    expected = cross_entropy(_logits(hidden, frozen), targets)
    _assert_near(_gradients(loss, [hidden]), _gradients(expected, [hidden]), 1e-5)
    of_sum = head_loss(hidden, frozen, targets, count=46, sizes=SMALL)
    assert float(of_sum.detach()) == pytest.approx(float(expected.detach()) / 2, rel=1e-5)


def test_no_targets_make_a_loss_of_zero():
    hidden, readout, *_ = _case()
    none = torch.empty(0, dtype=torch.int64)
    loss = head_loss(hidden, readout, none, none)
    (gradient,) = _gradients(loss, [hidden])
    assert float(loss.detach()) == 0.0
    assert not gradient.any()
    assert token_losses(hidden, readout, none, none).shape == (0,)


def test_token_losses_are_those_of_whole_logits():
    hidden, readout, targets, rows = _case(dtype=torch.float32, scale=0.5, cap=4.0)
    found = token_losses(hidden, readout, targets, rows, sizes=SMALL)
    expected = cross_entropy(_logits(hidden, readout)[rows], targets, reduction="none")
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert not found.requires_grad


def test_sixteen_bits_are_summed_in_fp32():
    hidden, readout, targets, rows = _case(dtype=torch.bfloat16)
    parts = (hidden, readout.weight, readout.bias)
    loss = head_loss(hidden, readout, targets, rows, sizes=SMALL)
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = cross_entropy(_logits(exact[0], Readout(*exact[1:]))[rows], targets)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    found = _gradients(loss, parts)
    assert all(gradient.dtype == torch.bfloat16 for gradient in found)
    _assert_near(found, _gradients(expected, exact), 2e-2)


@pytest.mark.few(1)
@pytest.mark.parametrize("trains", [False, True])
def test_memory_is_below_two_bytes_a_token_and_entry(torch_bytes, trains):
    tokens, classes, width = 1024, 49_152, 32
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(classes, width, requires_grad=trains)
    targets = torch.randint(classes, (tokens,))
    peak, _ = torch_bytes(lambda: head_loss(hidden, Readout(weight, None), targets).backward())
    own = hidden.nbytes + (2 * weight.nbytes if trains else 0)  # gradients, and that of the weight times the loss's
    assert peak - own < 2 * tokens * classes
    whole, _ = torch_bytes(lambda: cross_entropy(linear(hidden, weight), targets).backward())
    assert whole > 10 * tokens * classes


def test_products_on_accelerators_have_more_rows():
    cpu, gpu = chunk_sizes("cpu"), chunk_sizes("cuda")
    assert cpu.rows(128_256) == 128
    assert gpu.rows(128_256) == 523
    assert cpu.rows(100) == (1 << 22) // 100
    assert gpu.rows_in_fp32(128_256) == 65
    assert cpu.rows_in_fp32(1 << 30) == 1
