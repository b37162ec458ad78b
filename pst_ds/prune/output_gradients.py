"""Norms of the inputs and output gradients of a dense language model's layers, with one block on the device at a time.

A block's forward pass stores only its input. In the backward pass the block runs again with gradients, and passes on
the gradient of its input, as in gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pst_ds.errors import InputError
from pst_ds.nn.input_sums import InputGatherer, squares
from pst_ds.progress import Progress
from pst_ds.prune.model import without_cache
from pst_ds.prune.replay import Batch, BlockReplay, Output, moved


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Norms over all tokens, fp32 on the CPU."""

    inputs: Tensor
    """(I,): norm of each input."""
    outputs: Tensor
    """(O,): norm of the loss gradient at each output."""


def layer_norms(
    model: nn.Module,
    blocks: nn.ModuleList,
    layers: Sequence[Mapping[str, nn.Module]],
    batches: Sequence[Batch],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, LayerNorms]:
    """Return the norms of the linear ``layers`` of each of the ``blocks``, by name; the model stays as it was.

    The loss is that of the next token, summed over the text. The model stays on the CPU, and so do the inputs of all
    blocks, of one batch at a time; a block comes to ``device`` in ``dtype``. Raises InputError for a model without
    logits of tokens, and for layers that no block's forward pass calls.
    """
    two_way = _TwoWay(BlockReplay(model, blocks, batches, device, dtype), blocks, layers, device, dtype)
    with without_cache(model), two_way.in_place(), Progress("budgets", len(batches), "batches") as shown:
        for batch in batches:
            two_way.begin(batch)
            with torch.enable_grad():
                loss = _loss(model, batch)
                torch.autograd.grad(loss, two_way.first)
            shown.add(1, "")
    return two_way.norms()


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the summed next-token loss of a batch. Raises InputError for a model without token logits."""
    ids, logits = batch["input_ids"], getattr(model(**batch), "logits", None)
    if logits is None or logits.shape[:-1] != ids.shape:
        raise InputError(
            "--budgets saliency needs the loss of the next token, and this model gives no logits for every token; "
            "choose --budgets owl"
        )
    follows = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in batch:
        follows &= batch["attention_mask"].bool()
    if "position_ids" in batch:
        follows &= batch["position_ids"] != 0
    targets = ids.masked_fill(~follows, -100)[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")


@dataclass
class _TwoWay:
    """Blocks that are moved to the device for their forward and backward pass."""

    replay: BlockReplay
    blocks: nn.ModuleList
    layers: Sequence[Mapping[str, nn.Module]]
    device: torch.device
    dtype: torch.dtype
    gatherer: InputGatherer = field(default_factory=lambda: InputGatherer(squares))
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Sums of squares, double precision, by layer."""
    first: Tensor = field(default_factory=lambda: torch.empty(0))
    """Input of the first block, where the backward pass ends."""

    def begin(self, batch: Batch) -> None:
        self.gatherer.begin(batch)

    def norms(self) -> dict[str, LayerNorms]:
        names = [name for of_block in self.layers for name in of_block]
        idle = next((name for name in names if name not in self.outputs), None)
        if idle is not None:
            raise InputError(f"the model's forward pass does not call {idle}; leave it dense with pst.exclude_modules")
        found = {}
        for name in names:
            given = self.gatherer.sums[name].total
            assert given is not None
            found[name] = LayerNorms(given.sqrt().float().cpu(), self.outputs[name].sqrt().float().cpu())
        return found

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the blocks' forward passes are those that come to the device."""
        own = [block.__dict__.get("forward") for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = self._stand_in(index, block.forward)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _stand_in(self, index: int, forward: Callable[..., Output]) -> Callable[..., Output]:
        def run(*args: object, **kwargs: object) -> Output:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            assert isinstance(hidden, Tensor), "a block without hidden states"
            if index == 0:
                self.first = hidden = hidden.detach().requires_grad_()

            def block(states: Tensor) -> Output:
                states, others, named = moved((states, args, kwargs), self.device, self.dtype)
                return forward(states, *others, **named)

            return _Recomputed.apply(hidden, self, index, block)

        return run

    @contextmanager
    def listening(self, index: int) -> Iterator[None]:
        """Sums up what the layers of a block are given, and the gradients at what they give."""
        handles = [module.register_forward_hook(self._hook(name)) for name, module in self.layers[index].items()]
        try:
            with self.gatherer.listening(self.layers[index]):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            part = squares(gradient.reshape(-1, gradient.shape[-1]))
            self.outputs[name] = part if name not in self.outputs else self.outputs[name].add_(part)

        def take(_module: nn.Module, _args: object, output: Tensor) -> None:
            output.register_hook(add)

        return take


class _Recomputed(torch.autograd.Function):
    """Block that saves only its input and runs again in the backward pass.

    Only hidden states have a gradient; further outputs, such as attention weights, have none.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, two_way: _TwoWay, index: int, block: Callable[[Tensor], Output]) -> Output:
        ctx.save_for_backward(hidden)
        ctx.two_way, ctx.index, ctx.block = two_way, index, block
        with two_way.replay.resident(index):
            return moved(block(hidden), hidden.device, hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_others: Tensor | None) -> tuple[Tensor, None, None, None]:
        (hidden,), two_way = ctx.saved_tensors, ctx.two_way
        hidden = hidden.detach().requires_grad_()
        with two_way.replay.resident(ctx.index), torch.enable_grad(), two_way.listening(ctx.index):
            output = ctx.block(hidden)
            states = output if isinstance(output, Tensor) else output[0]
            (back,) = torch.autograd.grad(states, hidden, gradient.to(states.device, states.dtype))
        return back, None, None, None
