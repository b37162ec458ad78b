"""Fit the kept weights of a pruned block to the outputs of the dense block, on the calibration data.

Layers are pruned one by one, each for the best approximation of its outputs; together they are not optimal. The
block therefore runs again with gradients, and Adam minimises the error of its outputs (arXiv 2510.14444).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pst_ds.prune.blocks import Batch, BlockReplay, Compute, Forward, Output

RATE = 0.01
"""Initial learning rate of Adam, relative to the RMS of a layer's kept weights; it decreases linearly to 0."""


class BlockFit:
    """Fits one resident block of a ``replay`` in ``passes`` over the batches.

    Holds the dense block's outputs on the CPU, and three fp32 numbers per fitted weight on the block's device.
    """

    def __init__(self, replay: BlockReplay, index: int, passes: int):
        self._replay, self._index, self._passes = replay, index, passes
        self._wanted: list[Tensor] = []
        self._number = 0
        self._is_real: Tensor | None = None
        self.errors: tuple[float, float] = (0.0, 0.0)
        """Mean squared error of the block's outputs over all tokens, before and after."""

    def remember(self, forward: Forward) -> Output:
        """Run the dense block on the next batch, and store its output as the target."""
        output = forward()
        self._wanted.append(_hidden(output).to("cpu"))
        return output

    def fit(self, weights: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the fitted values of the pruned ``weights``, fp32 on their device; the block then has them.

        Zeros stay 0. If the error over all tokens does not decrease, the previous values are restored.
        """
        held = [weight.detach().to(torch.float32, copy=True) for weight in weights]
        masters = [values.clone() for values in held]
        sizes = [float(m.square().sum() / m.count_nonzero().clamp(min=1)) ** 0.5 for m in masters]
        groups = [{"params": [m], "lr": RATE * size} for m, size in zip(masters, sizes, strict=True)]
        optimizer, steps = torch.optim.Adam(groups), self._passes * len(self._wanted)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)

        def step(forward: Forward) -> Output:
            with torch.enable_grad():
                output = forward()
                gradients = torch.autograd.grad(self._difference(output).square().mean(), list(weights))
            for master, gradient, before in zip(masters, gradients, held, strict=True):
                master.grad = gradient.to(torch.float32) * (before != 0)
            optimizer.step()
            schedule.step()
            _write(weights, masters)
            return output

        before = self._error()
        with _with_gradients(weights):
            for _ in range(self._passes):
                self._run(step)
        after = self._error()
        if not after < before:
            _write(weights, held)
            self.errors = before, before
            return held
        self.errors = before, after
        return masters

    def _run(self, compute: Compute) -> None:
        self._number = -1
        self._replay.run(self._index, keep_output=False, before=self._begin, compute=compute)

    def _begin(self, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        self._number, self._is_real = self._number + 1, None if mask is None else mask.bool()

    def _difference(self, output: Output) -> Tensor:
        """Return the error of the current batch's output, (tokens, width) fp32, without padding."""
        made = _hidden(output)
        wanted = self._wanted[self._number].to(made.device)
        difference = made.to(torch.float32) - wanted.to(torch.float32)
        if self._is_real is None or self._is_real.shape != difference.shape[:-1]:
            return difference.flatten(0, -2)
        return difference[self._is_real.to(made.device)]

    def _error(self) -> float:
        """Return the mean squared error over all tokens."""
        total, number = 0.0, 0

        def add(forward: Forward) -> Output:
            nonlocal total, number
            output = forward()
            difference = self._difference(output)
            total, number = total + float(difference.square().sum(dtype=torch.float64)), number + difference.numel()
            return output

        self._run(add)
        return total / number


def _hidden(output: Output) -> Tensor:
    """Return the hidden states of a block's output."""
    return output if isinstance(output, Tensor) else output[0]


def _write(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.data.copy_(value)


@contextmanager
def _with_gradients(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    asked = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, before in zip(weights, asked, strict=True):
            weight.requires_grad_(before)
