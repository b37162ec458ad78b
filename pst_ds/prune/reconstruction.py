"""Fit the kept weights of a pruned block to the outputs of the dense block, on the calibration data.

Layers are pruned one by one, each for the best approximation of its outputs; together they are not optimal. The
block therefore runs again with gradients, and Adam minimises the error of its outputs (arXiv 2510.14444).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pst_ds.core.one_shot.shares import Ranks
from pst_ds.prune.blocks import Batch, BlockReplay, Compute, Forward, Output, hidden_of

RATE = 0.01
"""Initial learning rate of Adam, relative to the RMS of a layer's kept weights; it decreases linearly to 0."""


class BlockFit:
    """Fits one resident block of a ``replay`` in ``passes`` over the batches; a step is a batch.

    Holds the dense block's outputs on the CPU, and on the block's device five fp32 numbers and a 64-bit sum per fitted
    weight. Ranks compute the gradients of their pieces. The sums are exact, so all ranks make the same steps.
    """

    def __init__(self, replay: BlockReplay, index: int, passes: int):
        self._replay, self._index, self._passes = replay, index, passes
        self._ranks = replay.data.ranks
        self._wanted: list[Tensor] = []
        self._number = 0
        self._is_real: Tensor | None = None
        self.errors: tuple[float, float] = (0.0, 0.0)
        """Sum of squared errors of the block's outputs over all tokens, before and after."""

    def remember(self, forward: Forward) -> Output:
        """Run the dense block on the next piece, and store its output as the target."""
        output = forward()
        self._wanted.append(hidden_of(output).to("cpu"))
        return output

    def fit(self, weights: Sequence[nn.Parameter], dtypes: Sequence[torch.dtype], *, keep_output: bool) -> list[Tensor]:
        """Return fitted values of the pruned ``weights``, on their device; the block then has them. Collective.

        Zeros stay 0. If the error over all tokens does not decrease, the previous values are restored. The error of one
        batch would not do, because a few tokens with large activations dominate it.

        Args:
            dtypes: those that the values will be stored in.
            keep_output: store the outputs as the inputs of the next block.
        """
        held = [weight.detach().to(torch.float32, copy=True) for weight in weights]
        masters = [values.clone() for values in held]
        sizes = [float(m.square().sum() / m.count_nonzero().clamp(min=1)) ** 0.5 for m in masters]
        groups = [{"params": [m], "lr": RATE * size} for m, size in zip(masters, sizes, strict=True)]
        batches = range(len(self._replay.data.batches))
        optimizer, steps = torch.optim.Adam(groups), self._passes * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
        before = self._error(keep_output=False)
        with _with_gradients(weights):
            for batch in [*batches] * self._passes:
                terms = self._gradients(batch, weights)
                *gradients, number = exact_sums(terms, [*masters, torch.empty(1)], self._ranks)
                for master, gradient, values in zip(masters, gradients, held, strict=True):
                    # of the mean, not the sum: Adam's epsilon then damps the steps of weights that hardly matter
                    master.grad = gradient.to(master.device).mul_(values != 0).div_(float(number))
                optimizer.step()
                schedule.step()
                _write(weights, masters)
        masters = [master.to(dtype) for master, dtype in zip(masters, dtypes, strict=True)]
        _write(weights, masters)  # a resumed run continues with what was stored
        inputs = list(self._replay.outputs)
        after = self._error(keep_output=keep_output)
        if not after < before:
            masters, after = held, before
            _write(weights, held)
            self._replay.outputs = inputs
            if keep_output:
                self._error(keep_output=True)
        self.errors = before, after
        return masters

    def _gradients(self, batch: int, weights: Sequence[nn.Parameter]) -> list[list[Tensor]]:
        """Return the gradients of the squared error of each of this rank's pieces of a batch, and the number of
        its values, (1,)."""
        found: list[list[Tensor]] = []

        def compute(forward: Forward) -> Output:
            with torch.enable_grad():
                output = forward()
                difference = self._difference(output)
                error = difference.square().sum()
                number = torch.tensor([difference.numel()])
                found.append([*torch.autograd.grad(error, list(weights)), number])
            return output

        self._run(compute, only=batch)
        return found

    def _run(self, compute: Compute, *, keep_output: bool = False, only: int | None = None) -> None:
        self._number = sum(batch < only for batch, _ in self._replay.pieces) - 1 if only is not None else -1
        self._replay.run(self._index, keep_output=keep_output, before=self._begin, compute=compute, only=only)

    def _begin(self, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        self._number, self._is_real = self._number + 1, None if mask is None else mask.bool()

    def _difference(self, output: Output) -> Tensor:
        """Return the error of the current batch's output, (tokens, width) fp32, without padding."""
        made = hidden_of(output)
        wanted = self._wanted[self._number].to(made.device)
        difference = made.to(torch.float32) - wanted.to(torch.float32)
        if self._is_real is None or self._is_real.shape != difference.shape[:-1]:
            return difference.flatten(0, -2)
        return difference[self._is_real.to(made.device)]

    def _error(self, *, keep_output: bool) -> float:
        """Run all pieces; return the sum of squared errors over all tokens. Collective."""
        terms: list[list[Tensor]] = []

        def add(forward: Forward) -> Output:
            output = forward()
            terms.append([self._difference(output).square().sum().view(1)])
            return output

        self._run(add, keep_output=keep_output)
        (total,) = exact_sums(terms, [torch.empty(1)], self._ranks)
        return float(total)


def exact_sums(terms: Sequence[Sequence[Tensor]], like: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Return the sums of several tensors over the ``terms`` of all ranks, fp32, the same in every order. Collective.

    Values are rounded to multiples of the largest of their tensor times 2**-60 times the number of terms: gradients of
    inputs with large activations are many orders of magnitude above the others. ``like``: tensors of the same shapes
    and devices.
    """
    largest = [max((float(term[i].abs().amax()) for term in terms), default=0.0) for i in range(len(like))]
    table = torch.zeros(ranks.number, len(like) + 1, dtype=torch.float64)
    table[ranks.own] = torch.tensor([*largest, len(terms)], dtype=torch.float64)
    table = ranks.sums.all_sum(table)
    number = max(1, int(table[:, -1].sum()))
    found = []
    for i, (shape, most) in enumerate(zip(like, table[:, :-1].amax(0).tolist(), strict=True)):
        step = 2.0 ** (math.frexp(most)[1] + math.frexp(number)[1] - 61) if math.isfinite(most) else 1.0
        total = torch.zeros_like(shape, dtype=torch.int64)
        for term in terms:
            total += (term[i].to(torch.float32) / step).round_().to(torch.int64)
        found.append((ranks.sums.all_sum(total).to(torch.float64) * step).to(torch.float32))
    return found


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
