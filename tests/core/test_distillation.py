"""The divergence from a teacher against torch's, in float64 with autograd."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from pst_ds.core.distillation import divergence, relative_distance


def reference(student, teacher, temperature):
    student = student.double().requires_grad_()
    q, p = log_softmax(student / temperature, -1), log_softmax(teacher.double() / temperature, -1)
    loss = temperature**2 * kl_div(q, p, reduction="batchmean", log_target=True)
    loss.backward()
    return float(loss.detach()), student.grad


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
@pytest.mark.parametrize("rows", [1, 256, 600])
def test_divergence_and_gradient(temperature, rows):
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(rows, 37, generator=generator) * 3).requires_grad_()
    teacher = torch.randn(rows, 37, generator=generator) * 3
    found = divergence(student, teacher, temperature)
    (found * 0.5).backward()
    loss, grad = reference(student.detach(), teacher, temperature)
    assert float(found.detach()) == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(student.grad.double(), 0.5 * grad, atol=1e-6)


def test_it_is_zero_for_equal_predictions_and_keeps_the_dtype():
    logits = torch.randn(5, 11, dtype=torch.bfloat16).requires_grad_()
    loss = divergence(logits, logits.detach() + 3.0)  # a constant changes no prediction
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-3)
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    divergence(student, teacher).backward()
    assert teacher.grad is None


def test_the_distance_of_states_is_a_mean_over_tokens_that_no_large_one_rules():
    generator = torch.Generator().manual_seed(0)
    teacher = [torch.randn(3, 5, 8, generator=generator) for _ in range(2)]
    teacher[0][0, 0] *= 1e3
    student = [(t + 0.1 * torch.randn(t.shape, generator=generator)).requires_grad_() for t in teacher]
    each = [((s - t) ** 2).sum(-1) / (t**2).sum(-1) for s, t in zip(student, teacher, strict=True)]
    assert float(relative_distance(student, teacher).detach()) == pytest.approx(float(sum(e.mean() for e in each)) / 2)
    rows = torch.zeros(3, 5, dtype=torch.bool)
    rows[1, 2:4] = True
    found = relative_distance(student, teacher, rows)
    assert float(found.detach()) == pytest.approx(float(sum(e[1, 2:4].mean() for e in each)) / 2)
    found.backward()
    assert not student[0].grad[~rows].any()
    assert student[1].grad[rows].all()
    zero = [torch.zeros(2, 4)]
    assert float(relative_distance(zero, zero)) == 0.0
