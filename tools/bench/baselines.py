"""The plain PST algorithm in torch autograd, as a baseline of benchmarks and a reference of tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class _KeepBySort(torch.autograd.Function):
    """Mask out the floor(sparsity * numel) smallest scores by a full sort, with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sparsity: float) -> Tensor:
        order = scores.flatten().argsort()
        mask = torch.ones_like(scores)
        mask.view(-1)[order[: int(sparsity * scores.numel())]] = 0
        return mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class PlainPST(nn.Module):
    """The equations of arXiv 2205.11005, with the mask selected in every forward pass.

    S and W are dense and in the weight's dtype; autograd keeps them until the backward pass.
    """

    def __init__(self, replaced: nn.Linear, outputs: int, inputs: int, rank: int, sparsity: float):
        super().__init__()
        self.weight, self.bias, self.sparsity = replaced.weight, replaced.bias, sparsity

        def new(*shape: int, std: float = 0.0) -> nn.Parameter:
            values = torch.randn(shape) * std if std else torch.zeros(shape)
            return nn.Parameter(values.to(replaced.weight.dtype))

        self.U, self.V = new(outputs, rank, std=0.02), new(rank, inputs)
        self.A, self.B = new(outputs, rank, std=0.02), new(rank, inputs)
        self.R, self.C = new(outputs, 1), new(1, inputs)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.U @ self.V
        scores = weight.abs() + self.A @ self.B + self.R + self.C
        mask = _KeepBySort.apply(scores, self.sparsity)
        return linear(x, mask * weight, self.bias)


def replace_linears(
    model: nn.Module, targets: list[tuple[str, nn.Linear]], build: Callable[..., nn.Module], rank: int, sparsity: float
) -> None:
    """Replace every linear layer in ``targets`` by ``build(linear, outputs, inputs, rank, sparsity)``."""
    for name, module in targets:
        parent = model.get_submodule(name.rpartition(".")[0])
        new = build(module, module.out_features, module.in_features, rank, sparsity)
        setattr(parent, name.rpartition(".")[2], new)
