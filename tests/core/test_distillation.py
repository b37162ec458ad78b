"""The loss beside a teacher against torch's, in float64 with autograd."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from pst_ds.core.distillation import distilled_loss
from tests.pairs import every_pair


def reference(student, teacher, targets, weight, temperature):
    student = student.double().requires_grad_()
    q, p = log_softmax(student / temperature, -1), log_softmax(teacher.double() / temperature, -1)
    soft = temperature**2 * kl_div(q, p, reduction="batchmean", log_target=True)
    loss = (1.0 - weight) * cross_entropy(student, targets) + weight * soft
    loss.backward()
    return float(loss.detach()), student.grad


@every_pair
@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (40, 37), (5, 1 << 19), (3, (1 << 20) + 1)])
def test_loss_and_gradient(temperature, weight, rows, classes):
    generator = torch.Generator().manual_seed(0)
    student = (torch.randn(rows, classes, generator=generator) * 3).requires_grad_()
    teacher = torch.randn(rows, classes, generator=generator) * 3
    targets = torch.randint(classes, (rows,), generator=generator)
    found = distilled_loss(student, teacher, targets, weight, temperature)
    (found * 0.5).backward()
    loss, grad = reference(student.detach(), teacher, targets, weight, temperature)
    rounding = 1e-4 if classes < 1 << 20 else 1e-3  # torch sums a row in fp32, in as few lanes as the processor has
    assert float(found.detach()) == pytest.approx(loss, rel=rounding)
    assert float((student.grad.double() - 0.5 * grad).norm()) <= rounding * float(grad.norm())


@every_pair
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("student_too", [False, True])
def test_classes_that_the_teacher_rules_out_count_for_nothing(temperature, student_too):
    """0 log 0 is 0: with -inf for a logit the divergence and its gradient are those over the other classes."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(6, 9, generator=generator) for _ in range(2))
    targets = torch.tensor([0, 1, 2, 3, 1, 0])
    teacher[:, [4, 8]] = -math.inf
    if student_too:
        student[:, [4, 8]] = -math.inf
    student.requires_grad_()
    found = distilled_loss(student, teacher, targets, 0.3, temperature)
    found.backward()
    ours = student.detach().double().requires_grad_()
    p = torch.softmax(teacher.double() / temperature, -1)
    log_q = log_softmax(ours / temperature, -1)
    soft = sum(p[i, c] * (p[i, c].log() - log_q[i, c]) for i in range(6) for c in range(9) if p[i, c] > 0) / 6
    loss = 0.7 * cross_entropy(ours, targets) + 0.3 * temperature**2 * soft
    loss.backward()
    assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert torch.allclose(student.grad.double(), ours.grad, atol=1e-7)


def test_a_student_that_rules_out_what_the_teacher_does_not_is_infinitely_far():
    student, teacher = torch.zeros(1, 3), torch.zeros(1, 3)
    student[0, 2] = -math.inf
    assert float(distilled_loss(student, teacher, torch.tensor([0]), 1.0)) == math.inf


def test_it_is_zero_for_equal_predictions_and_keeps_the_dtype():
    logits = torch.randn(5, 11, dtype=torch.bfloat16).requires_grad_()
    loss = distilled_loss(logits, logits.detach() + 3.0, torch.zeros(5, dtype=torch.int64), 1.0)  # all alike: no change
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-3)
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16


def test_no_gradient_reaches_the_teacher():
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    distilled_loss(student, teacher, torch.tensor([0, 1, 3]), 0.5).backward()
    assert teacher.grad is None
