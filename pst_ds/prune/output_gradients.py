"""Norms of the inputs and output gradients of a dense language model's layers, with one block on the device at a time.

A forward pass stores the inputs of all blocks. In the backward pass each block runs again with gradients, and passes on
the gradient of its input, as in gradient checkpointing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pst_ds.core.one_shot.shares import Ranks
from pst_ds.errors import InputError
from pst_ds.nn.input_sums import InputGatherer, InputSum, squares
from pst_ds.nn.model_structure import model_width
from pst_ds.nn.targets import Target
from pst_ds.progress import Progress
from pst_ds.prune.blocks import Batch, BlockReplay, BlockSource, Calibration, Forward, Output, hidden_of

PIECES = 32
"""Most pieces that are used: norms need fewer tokens than Gram matrices. With 8 instead of 32 pieces of 512 tokens, a
135M Llama pruned to 50 % loses 0.013 nats on text like the calibration's, and 0.04 on other text."""
STORED_BYTES = 2 * 2**30
"""Memory for the inputs of all blocks; more pieces than fit go through the model one group after another."""


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Norms over all tokens, fp32 on the CPU."""

    inputs: Tensor
    """(I,): norm of each input."""
    outputs: Tensor
    """(O,): norm of the loss gradient at each output."""


def layer_norms(
    model: nn.Module, blocks: BlockSource, targets: Sequence[Mapping[str, Target]], data: Calibration
) -> dict[str, LayerNorms]:
    """Return the norms of the linear ``targets`` of each block, by name; the model is unchanged. Collective.

    The loss is the sum over all next tokens. Raises InputError for a model without logits of tokens, and for layers
    that no block's forward pass calls.
    """
    replay = BlockReplay(model, blocks, data)
    sums = _Sums(data.ranks)
    pieces = data.own_pieces(PIECES)
    num_blocks = len(blocks.blocks)
    most_tokens = max((piece["input_ids"].numel() for _, piece in pieces), default=1)
    bytes_per_piece = num_blocks * most_tokens * model_width(model) * data.dtype.itemsize
    together = max(1, STORED_BYTES // bytes_per_piece)
    with replay.in_place(), Progress("budgets", max(1, len(pieces)), "pieces") as shown:
        # A rank without pieces makes one empty round: the others wait for it where the sums get their units.
        for first in range(0, max(1, len(pieces)), together):
            replay.take(pieces[first : first + together])
            inputs, gradients = _forward(replay, num_blocks)
            for index in reversed(range(num_blocks)):
                replay.outputs = inputs[index]
                _back(replay, index, targets[index], gradients=gradients, sums=sums, is_first=first == 0)
            shown.add(len(replay.pieces), "")
    all_targets: dict[str, Target] = {}
    for targets_of_block in targets:
        all_targets |= targets_of_block
    return sums.norms(all_targets, data.device)


def _forward(replay: BlockReplay, num_blocks: int) -> tuple[list[list[Output]], list[Tensor]]:
    """Return the inputs of each block, and the gradients of the last one's output, by piece."""
    inputs: list[list[Output]] = []
    for index in range(num_blocks):
        inputs.append(list(replay.outputs))
        with replay.resident(index):
            replay.run(index, keep_output=True)
    gradients = []
    for place, (_, piece) in enumerate(replay.pieces):
        with torch.enable_grad():
            last, output = replay.after_blocks(place)
            gradients.append(torch.autograd.grad(_loss(output, piece), last)[0])
    return inputs, gradients


def _back(
    replay: BlockReplay,
    index: int,
    targets: Mapping[str, Target],
    *,
    gradients: list[Tensor],
    sums: "_Sums",
    is_first: bool,
) -> None:
    """Run block ``index`` forward and backward; replace ``gradients`` by those of its input."""
    places = iter(range(len(gradients)))  # the pieces are run in order, one call of ``compute`` for each

    def compute(forward: Forward) -> Output:
        place = next(places)
        with torch.enable_grad():
            output = forward()
            states = hidden_of(output)
            gradient = gradients[place].to(states.device, states.dtype)
            (gradients[place],) = torch.autograd.grad(states, replay.leaf, gradient)
        return output

    settle: Callable[[], None] | None = None
    if is_first:
        # Collective: after its first piece every rank rounds to the same multiples, so that their sums are exact.
        settle = partial(sums.settle, list(targets))
    with replay.resident(index), sums.listening({name: target.module for name, target in targets.items()}):
        replay.run(
            index, keep_output=False, before=sums.inputs.begin, compute=compute, after_first=settle, gradients=True
        )


def _loss(output: object, batch: Batch) -> Tensor:
    """Return the summed next-token loss of a model's ``output``. Raises InputError without logits of tokens."""
    ids = batch["input_ids"]
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:-1] != ids.shape:
        raise InputError(
            'budgets = "saliency": the model returns no logits for every token, and the budgets need the loss of the '
            'next token. Set budgets = "equal"'
        )
    follows = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in batch:
        follows &= batch["attention_mask"].bool()
    if "position_ids" in batch:
        follows &= batch["position_ids"] != 0
    targets = ids.masked_fill(~follows, -100)[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum")


class _Sums:
    """Sums of the squares of layers' inputs, and of the gradients of their outputs."""

    def __init__(self, ranks: Ranks):
        self.inputs = InputGatherer(squares)
        self.outputs = InputGatherer(squares)
        self._ranks = ranks

    @contextmanager
    def listening(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Add the inputs of the layers, and the gradients of their outputs, in the context."""
        with ExitStack() as stack:
            for name, module in layers.items():
                stack.callback(module.register_forward_hook(self._hook(name)).remove)
            stack.enter_context(self.inputs.listening(layers))
            yield

    def _hook(self, name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            total = self.outputs.sums.setdefault(name, InputSum())
            total.add(squares(gradient.reshape(-1, gradient.shape[-1])))  # (tokens, O)

        def listen(_module: nn.Module, _args: object, output: Tensor) -> None:
            output.register_hook(add)

        return listen

    def settle(self, names: Sequence[str]) -> None:
        """Fix the rounding of the sums of these layers, after the first piece. Collective."""
        for gatherer in (self.inputs, self.outputs):
            gatherer.settle(names, self._ranks)

    def norms(self, targets: Mapping[str, Target], device: torch.device) -> dict[str, LayerNorms]:
        """Return the norms over all ranks. Collective. Raises InputError for a layer that did not run."""
        in_features: dict[str, int] = {}
        out_features: dict[str, int] = {}
        for name, target in targets.items():
            in_features[name] = target.layout.in_features
            out_features[name] = target.layout.out_features
        self.inputs.add_ranks(in_features, device, self._ranks)
        self.outputs.add_ranks(out_features, device, self._ranks)
        norms: dict[str, LayerNorms] = {}
        for name in targets:
            if name not in self.outputs.sums:
                raise InputError(
                    f"the model's forward pass does not call {name}. Leave it dense with pst.exclude_modules"
                )
            of_inputs = self.inputs.sums[name].total
            of_gradients = self.outputs.sums[name].total
            assert of_inputs is not None
            assert of_gradients is not None
            norms[name] = LayerNorms(of_inputs.sqrt().float().cpu(), of_gradients.sqrt().float().cpu())
        return norms
