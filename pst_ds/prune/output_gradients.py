"""Norms of the inputs and output gradients of a dense language model's layers, with one block on the device at a time.

A block's forward pass stores only its input. In the backward pass the block runs again with gradients, and passes on
the gradient of its input, as in gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pst_ds.errors import InputError
from pst_ds.nn.input_sums import InputGatherer, squares
from pst_ds.progress import Progress
from pst_ds.prune.blocks import Batch, BlockReplay, Calibration, Output, moved, replaced_blocks


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Norms over all tokens, fp32 on the CPU."""

    inputs: Tensor
    """(I,): norm of each input."""
    outputs: Tensor
    """(O,): norm of the loss gradient at each output."""


def layer_norms(
    model: nn.Module, blocks: nn.ModuleList, layers: Sequence[Mapping[str, nn.Module]], data: Calibration
) -> dict[str, LayerNorms]:
    """Return the norms of the linear ``layers`` of each of the ``blocks``, by name; the model is unchanged.

    The loss is the sum over all next tokens. The CPU holds the model and, for one batch, the inputs of all blocks; a
    block is moved to the device when it runs. Raises InputError for a model without logits of tokens, and
    for layers that no block's forward pass calls.
    """
    two_way = _TwoWay(BlockReplay(model, blocks, data), layers)
    replaced = replaced_blocks(model, blocks, two_way.stand_in)
    with replaced, Progress("budgets", len(data.batches), "batches") as shown:
        for batch in data.batches:
            two_way.gatherer.begin(batch)
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
            "--budgets saliency: the model returns no logits for every token, and the budgets need the loss of the "
            "next token. Choose --budgets owl"
        )
    follows = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in batch:
        follows &= batch["attention_mask"].bool()
    if "position_ids" in batch:
        follows &= batch["position_ids"] != 0
    targets = ids.masked_fill(~follows, -100)[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")


class _TwoWay:
    """Blocks that are moved to the device for their forward and backward pass."""

    def __init__(self, replay: BlockReplay, layers: Sequence[Mapping[str, nn.Module]]):
        self.replay, self._layers = replay, layers
        self.gatherer = InputGatherer(squares)
        self._outputs: dict[str, Tensor] = {}
        """Sums of squared output gradients, double precision, by layer."""
        self.first: Tensor
        """Input of the first block, where the backward pass ends."""

    def norms(self) -> dict[str, LayerNorms]:
        found = {}
        for name in (name for of_block in self._layers for name in of_block):
            if name not in self._outputs:
                raise InputError(
                    f"the model's forward pass does not call {name}. Leave it dense with pst.exclude_modules"
                )
            given = self.gatherer.sums[name].total
            assert given is not None
            found[name] = LayerNorms(given.sqrt().float().cpu(), self._outputs[name].sqrt().float().cpu())
        return found

    def stand_in(self, index: int, forward: Callable[..., Output]) -> Callable[..., Output]:
        def run(*args: object, **kwargs: object) -> Output:
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            assert isinstance(hidden, Tensor), "a block without hidden states"
            if index == 0:
                self.first = hidden = hidden.detach().requires_grad_()

            def block(states: Tensor) -> Output:
                states, others, named = self.replay.moved((states, args, kwargs))
                return forward(states, *others, **named)

            return _Recomputed.apply(hidden, self, index, block)

        return run

    @contextmanager
    def listening(self, index: int) -> Iterator[None]:
        """Sum the inputs of the layers of a block, and the gradients of their outputs."""
        with ExitStack() as stack:
            for name, module in self._layers[index].items():
                stack.callback(module.register_forward_hook(self._hook(name)).remove)
            stack.enter_context(self.gatherer.listening(self._layers[index]))
            yield

    def _hook(self, name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            part = squares(gradient.reshape(-1, gradient.shape[-1]))
            self._outputs[name] = part if name not in self._outputs else self._outputs[name].add_(part)

        def listen(_module: nn.Module, _args: object, output: Tensor) -> None:
            output.register_hook(add)

        return listen


class _Recomputed(torch.autograd.Function):
    """Block that saves only its input and runs again in the backward pass.

    Only hidden states have a gradient; further outputs, such as attention weights, do not.
    """

    @staticmethod
    def forward(ctx, hidden, two_way, index, block):
        ctx.save_for_backward(hidden)
        ctx.two_way, ctx.index, ctx.block = two_way, index, block
        with two_way.replay.resident(index):
            return moved(block(hidden), hidden.device, hidden.dtype)

    @staticmethod
    def backward(ctx, gradient, *_others):
        (hidden,), two_way = ctx.saved_tensors, ctx.two_way
        hidden = hidden.detach().requires_grad_()
        with two_way.replay.resident(ctx.index), torch.enable_grad(), two_way.listening(ctx.index):
            output = ctx.block(hidden)
            states = output if isinstance(output, Tensor) else output[0]
            (back,) = torch.autograd.grad(states, hidden, gradient.to(states.device, states.dtype))
        return back, None, None, None
