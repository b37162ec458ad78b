"""Run a model block by block on all batches: block i gets the outputs of the current, pruned blocks before it.

Every block runs inside the model's forward pass, with the arguments that the model passes. In the pass for block i the
blocks before it do not compute: they return the stored output of block i - 1, and the pass ends after block i. Each
pass repeats the computation before the blocks (embeddings, masks, rotations), and none reaches the computation after
them. Between passes only the outputs of one block are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.errors import InputError

Batch = Mapping[str, Tensor]
"""Arguments of a model's forward pass, on the CPU."""

Output = Any
"""Output of a block: hidden states, or a tuple that starts with them."""
Forward = Callable[[], Output]
"""Runs a block on a batch."""
Compute = Callable[[Forward], Output]
"""Gets a function that runs a block on a batch, and returns the output."""


def _plainly(forward: Forward) -> Output:
    return forward()


class _BlockDone(Exception):
    """Ends a forward pass after its block."""


class BlockReplay:
    """Runs the ``blocks`` of ``model``, one after another, on all ``batches``.

    The model stays on the CPU; the block that runs is moved to ``device`` and ``dtype`` by :meth:`resident`, and its
    arguments are too. Use it as a context: within it the blocks' forward passes are replaced.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        batches: Sequence[Batch],
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._model, self._blocks, self._batches = model, list(blocks), batches
        self._device, self._dtype = device, dtype
        self._outputs: list[Output] = [None] * len(batches)
        self._block = self._batch = 0
        self._keeps_output = False
        self._compute: Compute = _plainly

    def __enter__(self) -> BlockReplay:
        self._own_forward = [block.__dict__.get("forward") for block in self._blocks]
        for index, block in enumerate(self._blocks):
            block.forward = self._stand_in(index, block.forward)
        return self

    def __exit__(self, *error: object) -> None:
        for block, own in zip(self._blocks, self._own_forward, strict=True):
            del block.forward
            if own is not None:
                block.forward = own

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """Move block ``index`` to the device and dtype of the passes inside the context.

        Changes of ``parameter.data`` on the device are lost if it is a copy: change the stored values too.
        """
        block = self._blocks[index]
        tensors = [*block.parameters(), *block.buffers()]
        held = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = moved(tensor.data, self._device, self._dtype)
            yield
        finally:
            for tensor, data in zip(tensors, held, strict=True):
                tensor.data = data

    def run(
        self,
        index: int,
        *,
        keep_output: bool,
        before: Callable[[Batch], None] | None = None,
        compute: Compute | None = None,
    ) -> None:
        """Run block ``index`` on every batch. Blocks must be run in order, each with ``keep_output`` last.

        Args:
            index: the block.
            keep_output: store the outputs as the inputs of the next block.
            before: called with every batch before its pass.
            compute: called with a function that runs the block, and returns the output. Gradients are off unless it
                enables them.

        Raises InputError if the model's forward pass does not reach the block.
        """
        self._block, self._keeps_output, self._compute = index, keep_output, compute or _plainly
        for number, batch in enumerate(self._batches):
            self._batch = number
            if before is not None:
                before(batch)
            try:
                with torch.no_grad():
                    self._model(**batch)
            except _BlockDone:
                continue
            raise InputError(
                f"the model's forward pass does not run its block {index} of {len(self._blocks)}, a "
                f"{type(self._blocks[index]).__name__}; it cannot be pruned block by block"
            )

    def _stand_in(self, index: int, forward: Callable[..., Output]) -> Callable[..., Output]:
        def replay(*args: object, **kwargs: object) -> object:
            if index < self._block:
                return self._outputs[self._batch]
            args, kwargs = moved((args, kwargs), self._device, self._dtype)
            output = self._compute(lambda: forward(*args, **kwargs))
            if self._keeps_output:
                self._outputs[self._batch] = moved(output, torch.device("cpu"), self._dtype)
            raise _BlockDone

        return replay


def moved(value: Output, device: torch.device, dtype: torch.dtype) -> Output:
    """Return ``value`` with every tensor in it on ``device``, and floating-point tensors in ``dtype``."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device, dtype) for item in value)
    if type(value) is dict:
        return {key: moved(item, device, dtype) for key, item in value.items()}
    return value
