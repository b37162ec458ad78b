"""The loss of a language model from the hidden states before its head: logits exist for a chunk of tokens at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from pst_ds.core.coded_weight import CodedWeight, of_table_inputs, times_table
from pst_ds.core.distillation import loss_and_gradient, mean_with_gradients


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """Limits for the logits held in memory."""

    least_rows: int
    """Minimum rows per product with the head: fewer rows would read its weight too often."""
    numbers: int
    """Logits per product, if that allows more rows."""
    numbers_in_fp32: int
    """Logits whose softmax and gradient are held in fp32."""

    def rows(self, classes: int) -> int:
        """Return the rows per product with the head."""
        return max(self.least_rows, self.numbers // classes)

    def rows_in_fp32(self, classes: int) -> int:
        """Return the rows whose softmax is computed in one step."""
        return max(1, self.numbers_in_fp32 // classes)


_ON_CPU = ChunkSizes(least_rows=128, numbers=1 << 22, numbers_in_fp32=1 << 20)
"""An fp32 block stays in the caches."""
_ON_ACCELERATOR = ChunkSizes(least_rows=512, numbers=1 << 26, numbers_in_fp32=1 << 23)
"""512 rows do enough operations per byte of the weight for an H100; 8 million numbers outlast a launch."""


def chunk_sizes(device_type: str) -> ChunkSizes:
    """Return the default limits on a type of device."""
    if device_type == "cpu":
        return _ON_CPU
    return _ON_ACCELERATOR


@dataclass(frozen=True, slots=True)
class Readout:
    """Maps hidden states h to logits: s z, or c tanh(s z / c) with a cap c above 0, where z = h W' + b."""

    weight: Tensor | CodedWeight
    """(classes, width)."""
    bias: Tensor | None = None
    """(classes,)."""
    scale: float = 1.0
    cap: float = 0.0

    def output(self, hidden: Tensor) -> Tensor:
        """Return the head's output z of hidden states (rows, width): (rows, classes), in their dtype."""
        if isinstance(self.weight, CodedWeight):
            return times_table(hidden, self.weight, self.bias)
        return linear(hidden, self.weight, self.bias)

    def of_hidden(self, of_output: Tensor) -> Tensor:
        """Return dL/dh, (rows, width), from dL/dz."""
        if isinstance(self.weight, CodedWeight):
            return of_table_inputs(of_output, self.weight)
        return of_output @ self.weight.detach()

    def final(self, logits: Tensor) -> Tensor:
        """Return the logits for the head's output z, (rows, classes), in fp32."""
        logits = logits.float()
        if self.cap:
            return (logits * (self.scale / self.cap)).tanh_().mul_(self.cap)
        if self.scale == 1.0:  # without a copy of the largest tensor
            return logits
        return logits * self.scale

    def gradient(self, of_final: Tensor, final: Tensor) -> Tensor:
        """Return dL/dz from dL/d(logits), which is overwritten. ``final``: the logits."""
        if self.cap:
            # tanh' = 1 - tanh^2, and the logits are c tanh.
            of_final.mul_(1.0 - (final / self.cap).square_())
        if self.scale != 1.0:
            of_final.mul_(self.scale)
        return of_final


@dataclass(frozen=True, slots=True)
class Teacher:
    """Teacher whose predictions count in addition to the targets, as hidden states and head."""

    hidden: Tensor
    readout: Readout
    weight: float
    """Weight of the divergence in the loss, in [0, 1]."""
    temperature: float = 1.0


def head_loss(
    hidden: Tensor,
    readout: Readout,
    targets: Tensor,
    rows: Tensor | None = None,
    *,
    teacher: Teacher | None = None,
    count: Tensor | int | None = None,
    sizes: ChunkSizes | None = None,
) -> Tensor:
    """Return the mean cross-entropy over targets, in nats: a scalar, fp32. With a ``teacher``, :func:`distilled_loss`.

    ``hidden``: (tokens, width). ``targets``: (n,) int64 classes. ``rows``: (n,) int64, the token that predicts each
    target, all different; None uses every token in order. ``count`` divides the sum instead of n. Gradients are
    computed in the forward pass; the backward pass keeps a tensor like ``hidden``, and one like the weight if it
    trains.
    """
    sizes = sizes or chunk_sizes(hidden.device.type)
    weight: Tensor | None = None
    if not isinstance(readout.weight, CodedWeight):  # codes are integers, which do not train
        weight = readout.weight

    def compute(wants: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grads = _Gradients(hidden, weight, readout, wants)
        for part in _slices(len(targets), sizes.rows(readout.weight.shape[0])):
            chunk = _chosen(hidden, rows, part)  # (rows, width)
            logits = readout.output(chunk)  # (rows, classes)
            taught = None
            if teacher is not None:
                taught = teacher.readout.output(_chosen(teacher.hidden, rows, part))
            # Overwrites the logits by their gradient: the largest tensor exists once.
            total += _loss_of_chunk(
                logits=logits, readout=readout, targets=targets[part], taught=taught, teacher=teacher, sizes=sizes
            )
            rows_of_chunk: Tensor | slice = part
            if rows is not None:
                rows_of_chunk = rows[part]
            grads.add(rows_of_chunk, chunk, logits)
        return total, grads.tensors

    if count is None:
        count = max(len(targets), 1)  # the mean over no targets is 0, not NaN
    return mean_with_gradients(compute, count, hidden, weight, readout.bias)


@torch.no_grad()
def token_losses(
    hidden: Tensor, readout: Readout, targets: Tensor, rows: Tensor | None = None, sizes: ChunkSizes | None = None
) -> Tensor:
    """Return the cross-entropy of each target in nats, (n,) fp32, without a gradient; see :func:`head_loss`."""
    sizes = sizes or chunk_sizes(hidden.device.type)
    losses = [hidden.new_empty(0, dtype=torch.float32)]  # cat() needs a tensor, also without targets
    classes = readout.weight.shape[0]
    for part in _slices(len(targets), sizes.rows(classes)):
        logits = readout.output(_chosen(hidden, rows, part))
        for block in _slices(len(logits), sizes.rows_in_fp32(classes)):
            losses.append(cross_entropy(readout.final(logits[block]), targets[part][block], reduction="none"))
    return torch.cat(losses)


class _Gradients:
    """The requested gradients of the sum over all tokens. The gradient of the weight is accumulated in fp32."""

    def __init__(self, hidden: Tensor, weight: Tensor | None, readout: Readout, wants: Sequence[bool]):
        bias = readout.bias
        self._readout = readout
        self._dtype = readout.weight.dtype
        wants_hidden, wants_weight, wants_bias = wants
        self._hidden: Tensor | None = None
        self._of_weight: Tensor | None = None
        self._of_bias: Tensor | None = None
        if wants_hidden:
            self._hidden = torch.zeros_like(hidden)
        if wants_weight and weight is not None:
            self._of_weight = torch.zeros_like(weight, dtype=torch.float32)
        if wants_bias and bias is not None:
            self._of_bias = torch.zeros_like(bias, dtype=torch.float32)

    def add(self, rows: Tensor | slice, hidden: Tensor, of_logits: Tensor) -> None:
        """Add the terms of a chunk: its ``rows`` of the gradient of ``hidden``, and sums over these rows."""
        if self._hidden is not None:
            self._hidden[rows] = self._readout.of_hidden(of_logits)
        if self._of_weight is not None and self._dtype == torch.float32:
            # In place, which needs operands of the dtype of the sum.
            self._of_weight.addmm_(of_logits.T, hidden)
        elif self._of_weight is not None:
            self._of_weight += of_logits.T @ hidden
        if self._of_bias is not None:
            self._of_bias += of_logits.sum(0, dtype=torch.float32)

    @property
    def tensors(self) -> list[Tensor | None]:
        """The gradients of hidden states, weight and bias, in their dtypes; None for those not requested."""
        tensors = [self._hidden]
        for total in (self._of_weight, self._of_bias):
            if total is not None:
                total = total.to(self._dtype)
            tensors.append(total)
        return tensors


def _chosen(hidden: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    """Return the hidden states that predict the targets in ``part``; see :func:`head_loss` for ``rows``."""
    if rows is None:
        return hidden[part]
    return hidden[rows[part]]


def _loss_of_chunk(
    logits: Tensor, readout: Readout, targets: Tensor, taught: Tensor | None, teacher: Teacher | None, sizes: ChunkSizes
) -> Tensor:
    """Return the sum over rows, a float64 scalar, and overwrite the head's output ``logits`` by the gradient."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for block in _slices(len(logits), sizes.rows_in_fp32(logits.shape[1])):
        final = readout.final(logits[block])
        aims = targets[block].unsqueeze(1)  # (rows, 1)
        taught_final = None
        weight = 0.0
        temperature = 1.0
        if teacher is not None and taught is not None:
            taught_final = teacher.readout.final(taught[block])
            weight = teacher.weight
            temperature = teacher.temperature
        loss, gradient = loss_and_gradient(final, taught_final, aims, weight, temperature)
        total += loss
        logits[block] = readout.gradient(gradient, final)
    return total


def _slices(count: int, size: int) -> Iterator[slice]:
    """Yield consecutive slices of ``size`` that cover [0, ``count``)."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
