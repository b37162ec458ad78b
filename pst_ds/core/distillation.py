"""The distance between a student's and a teacher's predictions."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

_NUMBERS_AT_A_TIME = 1 << 20
"""fp32 logits per block: a few rows of a large vocabulary stay in the caches."""


def distilled_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, weight: float, temperature: float = 1.0
) -> Tensor:
    """Return (1 - w) CE(targets, student) + w T^2 KL(softmax(teacher / T) || softmax(student / T)), a scalar, fp32.

    Means over rows, in nats (arXiv 1503.02531, section 2). ``student`` and ``teacher``: logits (rows, classes).
    ``targets``: (rows,) int64. w = ``weight`` in [0, 1]. Only ``student`` receives a gradient, for which one tensor in
    its dtype is kept; autograd would keep several in fp32.
    """
    size = max(1, _NUMBERS_AT_A_TIME // student.shape[1])

    def compute(_: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        grad = torch.empty_like(student)
        for start in range(0, len(student), size):
            part = slice(start, start + size)
            loss, grad[part] = loss_and_gradient(
                student[part].float(), teacher[part].float(), targets[part].unsqueeze(1), weight, temperature
            )
            total += loss
        return total, [grad]

    return mean_with_gradients(compute, max(len(student), 1), student)


_Compute: TypeAlias = Callable[[Sequence[bool]], tuple[Tensor, Sequence[Tensor | None]]]
"""Returns a sum, a float64 scalar, and its gradients, given which of them are needed."""


def mean_with_gradients(compute: _Compute, count: Tensor | int, *inputs: Tensor | None) -> Tensor:
    """Return the sum of ``compute`` over ``count``, a scalar, fp32, with the gradients computed next to it."""
    mean: Tensor = _MeanWithGradients.apply(compute, count, *inputs)  # type: ignore[no-untyped-call]
    return mean


class _MeanWithGradients(torch.autograd.Function):
    """The autograd function of :func:`mean_with_gradients`."""

    @staticmethod
    def forward(ctx: Any, compute: _Compute, count: Tensor | int, *inputs: Tensor | None) -> Tensor:
        total, grads = compute(ctx.needs_input_grad[2:])
        ctx.save_for_backward(*grads)
        ctx.count = count
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_out / ctx.count
        scaled: list[Tensor | None] = []
        for grad in ctx.saved_tensors:
            if grad is not None:
                grad = grad * scale.to(grad.dtype)  # fp32 would make a wider copy
            scaled.append(grad)
        return (None, None, *scaled)  # nothing for the function and the count


def loss_and_gradient(
    student: Tensor, teacher: Tensor | None, targets: Tensor, weight: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the sum over rows of the terms of :func:`distilled_loss`, a float64 scalar, and its gradient.

    The gradient is (1 - w) (q - onehot) + w T (q_T - p_T) per row, (rows, classes) fp32.
    ``targets``: (rows, 1). Without a ``teacher``, ``weight`` must be 0.
    """
    log_q = torch.log_softmax(student, -1)
    hard = log_q.gather(1, targets).sum(dtype=torch.float64)
    if teacher is None:
        soft = hard.new_zeros(())
        q = log_q.exp_()
    elif temperature == 1.0:
        soft, p, q = _divergence(log_q, teacher)
        q.sub_(p, alpha=weight)  # (1 - w) q + w (q - p) in one step
    else:
        soft, p, soft_q = _divergence(torch.log_softmax(student / temperature, -1), teacher / temperature)
        q = log_q.exp_().mul_(1.0 - weight).add_(soft_q.sub_(p), alpha=weight * temperature)
    q.scatter_add_(1, targets, torch.full_like(targets, weight - 1.0, dtype=q.dtype))
    return weight * temperature**2 * soft - (1.0 - weight) * hard, q


def _divergence(log_q: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum over rows of KL(p || q), p, q) from log q, which is overwritten, and the teacher's logits.

    A class that the teacher excludes with a logit of -inf adds 0, the limit of p log p.
    """
    log_p = torch.log_softmax(teacher, -1)
    p = log_p.exp()
    difference = log_p.sub_(log_q)
    apart = torch.linalg.vecdot(p, difference)
    # On a CPU the copy is rarely needed. Elsewhere, checking would make the host wait for the device.
    if apart.device.type != "cpu" or type(apart) is not Tensor or not apart.isfinite().all():
        apart = torch.linalg.vecdot(p, difference.masked_fill_(p == 0.0, 0.0))
    return apart.sum(dtype=torch.float64), p, log_q.exp_()
