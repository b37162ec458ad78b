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
        self._replay = replay
        self._index = index
        self._passes = passes
        self._ranks = replay.data.ranks
        self._dense_outputs: list[Tensor] = []  # of this rank's pieces, in their order
        self._number = 0  # index of the current piece among them
        self._is_real: Tensor | None = None  # (examples, length), False where the current piece is padded
        self.errors: tuple[float, float] = (0.0, 0.0)
        """Sum of squared errors of the block's outputs over all tokens, before and after."""

    def remember(self, forward: Forward) -> Output:
        """Run the dense block on the next piece, and store its output as the target."""
        output = forward()
        self._dense_outputs.append(hidden_of(output).to("cpu"))
        return output

    def fit(self, weights: Sequence[nn.Parameter], dtypes: Sequence[torch.dtype], *, keep_output: bool) -> list[Tensor]:
        """Return fitted values of the pruned ``weights``, on their device; the block then has them. Collective.

        Zeros stay 0. If the error over all tokens does not decrease, the previous values are restored. The error of one
        batch would not do, because a few tokens with large activations dominate it.

        Args:
            dtypes: those that the values will be stored in.
            keep_output: store the outputs as the inputs of the next block.
        """
        previous = [weight.detach().clone() for weight in weights]
        kept = [_Kept.of(values, self._ranks) for values in previous]
        before = self._error(keep_output=False)
        self._optimize(weights, kept)
        fitted: list[Tensor] = []
        for share, values, dtype in zip(kept, previous, dtypes, strict=True):
            fitted.append(share.write(values.to(dtype, copy=True)))
        # The block computes with the rounded values from here on, as a resumed run does, which reads what was stored.
        _write(weights, fitted)
        inputs = list(self._replay.outputs)  # the next pass replaces them, and another may follow
        after = self._error(keep_output=keep_output)
        if not after < before:  # also if it is NaN
            fitted = previous
            after = before
            _write(weights, previous)
            self._replay.outputs = inputs
            if keep_output:
                self._error(keep_output=True)
        self.errors = (before, after)
        return fitted

    def _optimize(self, weights: Sequence[nn.Parameter], kept: "Sequence[_Kept]") -> None:
        """Move the ``kept`` values of ``weights`` by Adam, a step per batch, with gradients of all ranks. Collective.

        The weights have the values that they were fitted from.
        """
        groups = []
        for weight, share in zip(weights, kept, strict=True):
            groups.append({"params": [share.own], "lr": RATE * _rms_of_kept(weight.detach())})
        batches = range(len(self._replay.data.batches))
        steps = self._passes * len(batches)
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
        with _with_gradients(weights):
            for batch in [*batches] * self._passes:
                self._set_gradients(batch, weights, kept)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                for weight, share in zip(weights, kept, strict=True):
                    share.write(weight.data)

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
            # Only the kept weights' gradients stay until the batch is done: (kept,) each.
            of_kept: list[Tensor] = []
            for gradient, share in zip(gradients, kept, strict=True):
                of_kept.append(gradient.flatten().index_select(0, share.places))
            terms.append(of_kept)
            number += difference.numel()
            return output

        self._run(compute, only=batch)
        # of the mean, not the sum: Adam's epsilon then damps the steps of weights that hardly matter
        number_of_all = float(self._ranks.sums.all_sum(torch.tensor(number)))
        device = self._replay.data.device
        sums = exact_sums(terms, [share.number for share in kept], device, self._ranks, scattered=True)
        for share, gradient in zip(kept, sums, strict=True):
            share.own.grad = gradient.div_(number_of_all)

    def _run(self, compute: Compute, *, keep_output: bool = False, only: int | None = None) -> None:
        # One before the first piece that runs, since _begin counts up; pieces have the order of their batches.
        self._number = -1
        if only is not None:
            self._number += sum(batch < only for batch, _ in self._replay.pieces)
        self._replay.run(self._index, keep_output=keep_output, before=self._begin, compute=compute, only=only)

    def _begin(self, batch: Batch) -> None:
        mask = batch.get("attention_mask")
        self._number += 1
        self._is_real = None if mask is None else mask.bool()

    def _difference(self, output: Output) -> Tensor:
        """Return the error of the current batch's output, (tokens, width) fp32, without padding."""
        states = hidden_of(output)
        dense = self._dense_outputs[self._number].to(states.device)
        # in fp32: near the optimum, both are almost equal, and bf16 would leave little of the difference
        difference = states.to(torch.float32) - dense.to(torch.float32)
        if self._is_real is None or self._is_real.shape != difference.shape[:-1]:
            return difference.flatten(0, -2)
        return difference[self._is_real.to(states.device)]

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
        index_dtype = torch.int32 if weight.numel() < 1 << 31 else torch.int64
        places = weight.flatten().nonzero().flatten().to(index_dtype)
        values = _rows(weight.flatten().index_select(0, places), ranks)[ranks.own]
        return cls(places, number=len(places), own=values.to(torch.float32, copy=True), ranks=ranks)

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
    largest_here = [0.0] * len(sizes)
    for i, size in enumerate(sizes):
        if size:
            largest_here[i] = max((float(term[i].abs().amax()) for term in terms), default=0.0)
    # One row per rank: the largest value of each tensor, and the number of terms. A sum of rows that are 0 elsewhere
    # gathers them in one collective.
    table = torch.zeros(ranks.number, len(sizes) + 1, dtype=torch.float64)
    table[ranks.own] = torch.tensor([*largest_here, len(terms)], dtype=torch.float64)
    table = ranks.sums.all_sum(table)
    number = max(1, int(table[:, -1].sum()))
    largest = table[:, :-1].amax(0).tolist()
    sums: list[Tensor] = []
    for i, size in enumerate(sizes):
        # Sums of integers are exact in every order. With this power of 2, they stay below 2**61.
        step = 1.0
        if math.isfinite(largest[i]):
            step = 2.0 ** (math.frexp(largest[i])[1] + math.frexp(number)[1] - 61)
        total = torch.zeros(size, dtype=torch.int64, device=device)
        for term in terms:
            total += (term[i].to(torch.float32) / step).round_().to(torch.int64)
        total = ranks.scatter(_rows(total, ranks)) if scattered else ranks.sums.all_sum(total)
        sums.append(total.to(torch.float64).mul_(step).to(torch.float32))
    return sums


def _rows(values: Tensor, ranks: Ranks) -> Tensor:
    """Return the ``values``, (number,), as a row for each rank, filled up with zeros.

    Their length is a multiple of what a vector loop computes at once: its remainder may round differently.
    """
    length = -(-len(values) // (ranks.number * _AT_ONCE)) * _AT_ONCE
    return F.pad(values, (0, ranks.number * length - len(values))).view(ranks.number, length)


def _rms_of_kept(values: Tensor) -> float:
    """Return the root mean square of the values that are not 0."""
    values = values.to(torch.float32)
    return float(values.square().sum() / values.count_nonzero().clamp(min=1)) ** 0.5


def _write(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give weights other values, in their dtype and on their device."""
    for weight, value in zip(weights, values, strict=True):
        weight.data.copy_(value)


@contextmanager
def _with_gradients(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Compute gradients of ``weights`` inside the context."""
    asked = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, before in zip(weights, asked, strict=True):
            weight.requires_grad_(before)
