"""How far a student's predictions are from a teacher's, and its gradient (arXiv 1503.02531, section 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ROWS_AT_A_TIME = 256


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the mean over rows of KL(softmax(teacher / T) || softmax(student / T)), in nats: 0-d, fp32.

    ``student`` and ``teacher``: logits (rows, classes). The gradient goes to ``student`` alone; with the vocabulary of
    a language model as classes, one tensor in the dtype of ``student`` is all that is kept for it.
    """
    return _Divergence.apply(student, teacher, temperature)


class _Divergence(torch.autograd.Function):
    """d/dz of T^2 KL(p || softmax(z / T)) is T (softmax(z / T) - p): known as soon as the divergence is."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:  # type: ignore[override]
        rows = student.shape[0]
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        grad = torch.empty_like(student)
        for start in range(0, rows, _ROWS_AT_A_TIME):
            part = slice(start, start + _ROWS_AT_A_TIME)
            log_q = torch.log_softmax(student[part].float() / temperature, -1)
            log_p = torch.log_softmax(teacher[part].float() / temperature, -1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum(dtype=torch.float64)
            grad[part] = log_q.exp_().sub_(p).mul_(temperature / max(rows, 1))
        ctx.save_for_backward(grad)
        return (total * (temperature**2 / max(rows, 1))).float()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return grad * grad_out.to(grad.dtype), None, None
