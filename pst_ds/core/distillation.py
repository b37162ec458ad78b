"""How far a student's predictions, and its hidden states, are from a teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROWS_AT_A_TIME = 256


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the mean over rows of KL(softmax(teacher / T) || softmax(student / T)), in nats: 0-d, fp32
    (arXiv 1503.02531, section 2).

    ``student`` and ``teacher``: logits (rows, classes). The gradient goes to ``student`` alone; with the vocabulary of
    a language model as classes, one tensor in the dtype of ``student`` is all that is kept for it.
    """
    return _Divergence.apply(student, teacher, temperature)


def relative_distance(student: Sequence[Tensor], teacher: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
    """The mean over layers and tokens of |s - t|^2 / |t|^2: 0-d, fp32.

    ``student``, ``teacher``: hidden states of the same layers, (..., width) each; ``rows``: (...,) bool, the tokens
    that count, or None for all. SquareHead (arXiv 2310.06927) divides by the squares of all tokens together; here each
    token has its own, since a few tokens of a language model have states a thousand times as large as the others'.
    """
    total = student[0].new_zeros((), dtype=torch.float32)
    for own, other in zip(student, teacher, strict=True):
        if rows is not None:
            own, other = own[rows], other[rows]
        size = other.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        total = total + ((own.float() - other.float()).square().sum(-1) / size).mean()
    return total / len(student)


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
