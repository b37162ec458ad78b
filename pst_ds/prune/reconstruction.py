"""Fit the kept weights of a pruned block to the outputs of the dense block, on the calibration data.

Layers are pruned one by one, each for the best approximation of its outputs; together they are not optimal. The
block therefore runs again with gradients, and Adam minimises the error of its outputs (arXiv 2510.14444).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pst_ds.core.one_shot.shares import Ranks
from pst_ds.prune.blocks import Batch, BlockReplay, Compute, Forward, Output, hidden_of

RATE = 0.01
"""Initial learning rate of Adam, relative to the RMS of a layer's kept weights; it decreases linearly to 0."""
_AT_ONCE = 128  # see _rows


class BlockFit:
    """Fits one resident block of a ``replay`` in ``passes`` over the batches; a step is a batch.

    Holds the dense block's outputs on the CPU, and on the block's device its previous values and places, gradients of
    the rank's pieces of a batch, 64-bit sums of a layer, and its share of four fp32 numbers per kept weight. Ranks
    compute gradients of their pieces and move their share of the weights. Sums are exact: all have the same bits.
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
        held = [weight.detach().clone() for weight in weights]
        kept = [_Kept.of(values, self._ranks) for values in held]
        groups = [{"params": [k.own], "lr": RATE * _rms_of_kept(v)} for k, v in zip(kept, held, strict=True)]
        batches = range(len(self._replay.data.batches))
        optimizer, steps = torch.optim.Adam(groups), self._passes * len(batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
        before = self._error(keep_output=False)
        with _with_gradients(weights):
            for batch in [*batches] * self._passes:
                self._set_gradients(batch, weights, kept)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                for weight, one in zip(weights, kept, strict=True):
                    one.write(weight.data)
        made = [one.write(v.to(dtype, copy=True)) for one, v, dtype in zip(kept, held, dtypes, strict=True)]
        _write(weights, made)  # a resumed run continues with what was stored
        inputs = list(self._replay.outputs)
        after = self._error(keep_output=keep_output)
        if not after < before:
            made, after = held, before
            _write(weights, held)
            self._replay.outputs = inputs
            if keep_output:
                self._error(keep_output=True)
        self.errors = before, after
        return made

    def _set_gradients(self, batch: int, weights: Sequence[nn.Parameter], kept: "Sequence[_Kept]") -> None:
        """Give this rank's share of the ``kept`` values the gradient of a batch. Collective."""
        terms: list[list[Tensor]] = []
        number = 0

        def compute(forward: Forward) -> Output:
            nonlocal number
            with torch.enable_grad():
                output = forward()
                difference = self._difference(output)
                # The output need not depend on each weight: an indexer of sparse attention only chooses tokens.
                gradients = torch.autograd.grad(
                    difference.square().sum(), list(weights), allow_unused=True, materialize_grads=True
                )
            terms.append([g.flatten().index_select(0, one.places) for g, one in zip(gradients, kept, strict=True)])
            number += difference.numel()
            return output

        self._run(compute, only=batch)
        # of the mean, not the sum: Adam's epsilon then damps the steps of weights that hardly matter
        number_of_all = float(self._ranks.sums.all_sum(torch.tensor(number)))
        device = self._replay.data.device
        sums = exact_sums(terms, [one.number for one in kept], device, self._ranks, scattered=True)
        for one, gradient in zip(kept, sums, strict=True):
            one.own.grad = gradient.div_(number_of_all)

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
        (total,) = exact_sums(terms, [1], self._replay.data.device, self._ranks)
        return float(total)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The values of a weight that are not 0, of which every rank moves a share."""

    places: Tensor
    """int32, or int64 for a weight of 2**31 numbers. On a CPU, a bool mask would take ten times as long."""
    number: int
    own: Tensor
    """This rank's row of their :func:`_rows`, fp32."""
    ranks: Ranks

    @classmethod
    def of(cls, weight: Tensor, ranks: Ranks) -> "_Kept":
        places = weight.flatten().nonzero().flatten().to(torch.int32 if weight.numel() < 1 << 31 else torch.int64)
        values = _rows(weight.flatten().index_select(0, places), ranks)[ranks.own]
        return cls(places, len(places), values.to(torch.float32, copy=True), ranks)

    def write(self, weight: Tensor) -> Tensor:
        """Write the values of all ranks into ``weight``, rounded to its dtype, and return it. Collective."""
        every = self.ranks.gather(self.own.to(weight.dtype)).flatten()[: self.number]
        weight.view(-1).index_copy_(0, self.places.long(), every)
        return weight


def exact_sums(
    terms: Sequence[Sequence[Tensor]],
    sizes: Sequence[int],
    device: torch.device,
    ranks: Ranks,
    *,
    scattered: bool = False,
) -> list[Tensor]:
    """Return the sums of several tensors, (size,), over the ``terms`` of all ranks, fp32, the same in every order; if
    ``scattered``, only this rank's row of their :func:`_rows`. Collective.

    Values are rounded to multiples of the largest of their tensor times 2**-60 times the number of terms: gradients of
    inputs with large activations are many orders of magnitude above the others.
    """
    largest = [
        max((float(term[i].abs().amax()) for term in terms if size), default=0.0) for i, size in enumerate(sizes)
    ]
    table = torch.zeros(ranks.number, len(sizes) + 1, dtype=torch.float64)
    table[ranks.own] = torch.tensor([*largest, len(terms)], dtype=torch.float64)
    table = ranks.sums.all_sum(table)
    number = max(1, int(table[:, -1].sum()))
    found = []
    for i, (size, most) in enumerate(zip(sizes, table[:, :-1].amax(0).tolist(), strict=True)):
        step = 2.0 ** (math.frexp(most)[1] + math.frexp(number)[1] - 61) if math.isfinite(most) else 1.0
        total = torch.zeros(size, dtype=torch.int64, device=device)
        for term in terms:
            total += (term[i].to(torch.float32) / step).round_().to(torch.int64)
        total = ranks.scatter(_rows(total, ranks)) if scattered else ranks.sums.all_sum(total)
        found.append(total.to(torch.float64).mul_(step).to(torch.float32))
    return found


def _rows(values: Tensor, ranks: Ranks) -> Tensor:
    """Return the ``values``, (number,), as a row for each rank, filled up with zeros.

    Their length is a multiple of what a vector loop computes at once: its remainder may round differently.
    """
    length = -(-len(values) // (ranks.number * _AT_ONCE)) * _AT_ONCE
    return F.pad(values, (0, ranks.number * length - len(values))).view(ranks.number, length)


def _rms_of_kept(values: Tensor) -> float:
    values = values.to(torch.float32)
    return float(values.square().sum() / values.count_nonzero().clamp(min=1)) ** 0.5


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
