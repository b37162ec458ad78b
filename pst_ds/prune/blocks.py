"""Run a model block by block on all batches: block i gets the outputs of the current, pruned blocks before it.

Every block runs inside the model's forward pass, with the arguments that the model passes. In the pass for block i the
blocks before it do not compute: they return the stored output of block i - 1, and the pass ends after block i. Each
pass repeats the computation before the blocks (embeddings, masks, rotations), and none reaches the computation after
them. Between passes only the outputs of one block are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pst_ds.core.one_shot.shares import ALONE, Ranks
from pst_ds.errors import InputError
from pst_ds.nn.model_structure import outermost_list, text_config

if TYPE_CHECKING:
    from pst_ds.prune.outcome import Outcome, OutcomeT

Batch = Mapping[str, Tensor]
"""Arguments of a model's forward pass, on the CPU."""


PIECE_TOKENS = 512
"""Tokens, with padding, of the pieces of a batch that ranks share; a piece has at least one example."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration data, where and in which dtype blocks compute on it, and the ranks that share the work."""

    batches: Sequence[Batch]
    """The same on every rank."""
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks = ALONE

    def own_pieces(self, most: int | None = None) -> list[tuple[int, Batch]]:
        """Return this rank's (batch, piece): every ``ranks.number``-th of all, or of at most ``most`` of them."""
        pieces: list[tuple[int, Batch]] = []
        for number, batch in enumerate(self.batches):
            for piece in _pieces(batch):
                pieces.append((number, piece))
        step = 1
        if most is not None:
            step = max(1, -(-len(pieces) // most))
        # Which pieces are used does not depend on the number of ranks; only who computes them does.
        return pieces[::step][self.ranks.own :: self.ranks.number]


def _pieces(batch: Batch) -> list[Batch]:
    """Cut a batch between examples into pieces of about PIECE_TOKENS tokens."""
    main = batch.get("input_ids", next(iter(batch.values())))  # (examples, tokens), or (examples,)
    num_examples = main.shape[0]
    length = 1
    if main.dim() > 1:
        length = main.shape[1]
    for value in batch.values():
        # a tensor without an example per row cannot be cut
        if value.shape[:1] != (num_examples,):
            return [batch]
    size = max(1, PIECE_TOKENS // length)
    pieces: list[Batch] = []
    for first in range(0, num_examples, size):
        pieces.append({key: value[first : first + size] for key, value in batch.items()})
    return pieces


Output = Any
"""Output of a block: hidden states, or a tuple that starts with them."""
Forward = Callable[[], Output]
"""Runs a block on a batch."""
Compute = Callable[[Forward], Output]
"""Gets a function that runs a block on a batch, and returns the output."""


def find_blocks(model: nn.Module, names: Sequence[str]) -> tuple[str, nn.ModuleList]:
    """Return (name, ModuleList of the blocks) of the list that contains all modules in ``names``.

    Raises InputError if they are in two lists or outside of lists, and if blocks run more than once or share keys and
    values.
    """
    stack_of = {name: outermost_list(name, model) for name in names}
    for name, stack in stack_of.items():
        if not stack:
            raise InputError(
                f"{name} is not in a block, and calibration goes block by block. Exclude it with pst.exclude_modules, "
                'or set method = "magnitude"'
            )
    stacks = list(dict.fromkeys(stack_of.values()))
    if len(stacks) > 1:
        raise InputError(
            f"the layers are in {len(stacks)} stacks of blocks ({', '.join(stacks)}), and calibration supports "
            'one. Select the layers of one with pst.target_modules, or set method = "magnitude"'
        )
    blocks = model.get_submodule(stacks[0])
    assert isinstance(blocks, nn.ModuleList)
    num_shared = getattr(text_config(model), "num_kv_shared_layers", 0)
    if num_shared:
        raise InputError(
            f"num_kv_shared_layers = {num_shared}: the last blocks of {stacks[0]} use keys and values of earlier ones, "
            'but calibration runs each block separately. Set method = "magnitude"'
        )
    num_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    num_distinct = len(set(blocks))
    # Some configs count the layers of the cache, and blocks such as LongCat-Flash's have two.
    runs_once = len(_cache_layers(blocks)) == num_layers
    has_fewer_blocks = isinstance(num_layers, int) and num_layers > len(blocks)
    if num_distinct < len(blocks) or (has_fewer_blocks and not runs_once):
        raise InputError(
            f"{stacks[0]} has {num_distinct} distinct blocks for {max(len(blocks), num_layers or 0)} layers: a block "
            'that runs more than once cannot be pruned in between. Set method = "magnitude"'
        )
    return stacks[0], blocks


def _cache_layers(blocks: nn.ModuleList) -> set[int]:
    """Return the numbers that modules inside the blocks have as layers of transformers' cache."""
    numbers: set[int] = set()
    for module in blocks.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int):
            numbers.add(number)
    return numbers


def block_of(name: str, stack: str) -> int:
    """Return the index of the block of ``stack`` that contains the module ``name``."""
    return int(name.removeprefix(stack + ".").partition(".")[0])


@contextmanager
def replaced_blocks(
    model: nn.Module, blocks: nn.ModuleList, replacement: Callable[[int, Callable[..., Output]], Output]
) -> Iterator[None]:
    """Run ``replacement(index, forward)`` instead of each block's ``forward`` inside the context, without a cache."""
    config = text_config(model)
    # Hooks of other libraries may have set a function on a block itself, which comes back afterwards.
    set_before = [block.__dict__.get("forward") for block in blocks]
    caches = getattr(config, "use_cache", None)
    # a cache would keep the keys and values of every pass
    if caches is not None:
        config.use_cache = False
    for index, block in enumerate(blocks):
        block.forward = replacement(index, block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, set_before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
        if caches is not None:
            config.use_cache = caches


class BlockSource:
    """Where the values of a model's blocks are; here, in the model."""

    device = torch.device("cpu")
    """Where the model is, except for blocks."""

    def __init__(self, stack: str, blocks: nn.ModuleList):
        """``stack``: name of the list ``blocks`` in the model."""
        self.stack = stack
        self.blocks = blocks

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Have the stored values of block ``index`` in its parameters, on the CPU, inside the context."""
        yield

    def outcome(self, index: int, kind: type[OutcomeT]) -> list[OutcomeT] | None:
        """Return the outcome of the layers of a block that an earlier, killed run has finished; None for others."""
        return None

    def finish(self, index: int, layers: Sequence[Outcome]) -> None:
        """Keep the values of a pruned block and the outcome of its layers, inside :meth:`loaded`. Collective."""


SourceOf = Callable[[str, nn.ModuleList], BlockSource]
"""Returns the source of the blocks of a list, by its name."""


class _BlockDone(Exception):
    """Ends a forward pass after its block."""


class BlockReplay:
    """Runs the ``blocks`` of ``model``, one after another, on this rank's pieces, inside :meth:`in_place`.

    Between passes, only hidden states are stored, on the CPU. :meth:`resident` moves one block to the device and dtype
    of the ``data``.
    """

    def __init__(self, model: nn.Module, blocks: BlockSource, data: Calibration):
        self.model = model
        self.blocks = blocks.blocks
        self.data = data
        self.source = blocks
        self.take(data.own_pieces())
        self._block = 0
        """Index of the block that computes in this pass."""
        self._place = 0
        """Index of the piece that this pass is for."""
        self._dtype = data.dtype
        self._needs_leaf = False
        self._keeps_output = False
        self._compute: Compute | None = None

    def take(self, pieces: Sequence[tuple[int, Batch]]) -> None:
        """Start over with these (batch, piece) of this rank."""
        self.pieces = list(pieces)
        self.outputs: list[Output] = [None] * len(self.pieces)
        """Output of the previous block for each piece."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the blocks' forward passes inside the context."""
        with replaced_blocks(self.model, self.blocks, self._stand_in):
            yield

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """Have block ``index`` on the device and in the dtype of the passes inside the context.

        Changes of ``parameter.data`` on the device are lost if it is a copy: change the stored values too.
        """
        with self.source.loaded(index):
            tensors = [*self.blocks[index].parameters(), *self.blocks[index].buffers()]
            stored = [tensor.data for tensor in tensors]
            try:
                for tensor in tensors:
                    tensor.data = self.moved(tensor.data)
                yield
            finally:
                for tensor, data in zip(tensors, stored, strict=True):
                    tensor.data = data

    def run(
        self,
        index: int,
        *,
        keep_output: bool,
        before: Callable[[Batch], None] | None = None,
        compute: Compute | None = None,
        only: int | None = None,
        after_first: Callable[[], None] | None = None,
        gradients: bool = False,
    ) -> None:
        """Run block ``index`` on every piece. Blocks must be run in order, each with ``keep_output`` last.

        ``keep_output``: store the outputs as the inputs of the next block. ``before``: called with every piece before
        its pass. ``compute``: called with a function that runs the block, and returns the output; gradients are off
        unless it enables them. ``only``: a batch, whose pieces are run. ``after_first``: called once, after the first
        piece, also by a rank without any. ``gradients``: :attr:`leaf` then is the block's input, which has a gradient.
        Raises InputError if the model's forward pass does not reach the block.
        """
        self._needs_leaf = gradients
        self._block = index
        self._keeps_output = keep_output
        self._compute = compute
        for place, (batch, piece) in enumerate(self.pieces):
            self._place = place
            if only not in (None, batch):
                continue
            if before is not None:
                before(piece)
            try:
                with torch.no_grad():  # what is before the blocks needs no gradient; ``compute`` may enable them
                    self.model(**moved(dict(piece), self.source.device, self.data.dtype))
            except _BlockDone:
                if after_first is not None and not place:
                    after_first()
                continue
            raise InputError(
                f"the model's forward pass does not run its block {index} of {len(self.blocks)}, a "
                f'{type(self.blocks[index]).__name__}. Set method = "magnitude", reconstruct = 0 and budgets = "equal"'
            )
        if after_first is not None and not self.pieces:  # may be collective: the other ranks wait in it
            after_first()

    def moved(self, value: Output) -> Output:
        """Return ``value`` with every tensor in it on the device, and floating-point tensors in the dtype."""
        return moved(value, self.data.device, self.data.dtype)

    def after_blocks(self, place: int) -> tuple[Tensor, Output]:
        """Return the last block's stored hidden states of a piece, with a gradient, and the model's output of them."""
        self._block = len(self.blocks)  # every block returns the stored output
        self._place = place
        output = self.outputs[place]
        last = hidden_of(output).detach().to(self.source.device, self._dtype).requires_grad_()
        if isinstance(output, Tensor):
            self.outputs[place] = last
        else:
            self.outputs[place] = (last, *output[1:])
        return last, self.model(**moved(dict(self.pieces[place][1]), self.source.device, self.data.dtype))

    def _stand_in(self, index: int, forward: Callable[..., Output]) -> Callable[..., Output]:
        def replay(*args: object, **kwargs: object) -> Output:
            if index < self._block:
                return self.outputs[self._place]
            # Families pass the hidden states by position or by name.
            states = args[0] if args else kwargs["hidden_states"]
            assert isinstance(states, Tensor), "a block without hidden states"
            if not index:  # what the model itself passes to blocks, and expects after them
                self._dtype = states.dtype
            if self._needs_leaf:
                self.leaf = self.moved(states).detach().requires_grad_()
                if args:
                    args = (self.leaf, *args[1:])
                else:
                    kwargs = {**kwargs, "hidden_states": self.leaf}
            args, kwargs = self.moved((args, kwargs))  # leaves the leaf itself in place: it is on the device already
            run = partial(forward, *args, **kwargs)
            output = run() if self._compute is None else self._compute(run)
            if self._keeps_output:
                self.outputs[self._place] = moved(output, torch.device("cpu"), self.data.dtype)
            raise _BlockDone

        return replay


def hidden_of(output: Output) -> Tensor:
    """Return the hidden states of a block's output."""
    return output if isinstance(output, Tensor) else output[0]


def moved(value: Output, device: torch.device, dtype: torch.dtype) -> Output:
    """Return ``value`` with every tensor in it on ``device``, and floating-point tensors in ``dtype``."""
    return tree_map_only(Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), value)
