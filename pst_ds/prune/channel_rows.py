"""Find which outputs of a block's layers make which inputs of the next ones, by running it on marked values.

An output of a layer is set to NaN, and the inputs of other layers that become NaN depend on it. The inputs of a layer
are channels if no two depend on the same output, as in feed-forward layers. An output of attention reaches the inputs
of a head, and one before a norm or a residual connection all inputs: these cannot be removed. Names of modules do not
matter, so fused layers and new families need no changes.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from pst_ds.nn.model_structure import linear_shape
from pst_ds.prune.blocks import Batch, Forward

ROWS_AT_ONCE = 64
"""Rows that a pass marks, each in its own example."""
_TOKENS = 2
"""Tokens of each example."""


Rows = Mapping[str, Tensor]
"""(channels, rows of a channel) int64, ascending: the outputs that make each input, by the name of their layer."""


def probe_batch(batch: Batch) -> Batch:
    """Return the first tokens of a batch's first example, once for each row that a pass marks."""
    key = next(key for key in ("input_ids", "inputs_embeds", *batch) if key in batch)
    first = batch[key][:1, :_TOKENS]
    return {key: first.expand(ROWS_AT_ONCE, *first.shape[1:]).contiguous()}


def find_rows(forward: Forward, layers: Mapping[str, nn.Module]) -> dict[str, Rows]:
    """Return what makes the inputs of every layer of a block whose inputs are channels, by its name.

    ``forward``: runs the block on :func:`probe_batch`. ``layers``: its linear layers, by name; they compute nothing.
    """
    reached: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        for other, is_reached in _reached_from(name, linear_shape(layer)[0], forward, layers).items():
            reached.setdefault(other, {})[name] = is_reached
    rows_of: dict[str, Rows] = {}
    for other, by_layer in reached.items():
        rows = _rows(by_layer)
        if rows is not None:
            rows_of[other] = rows
    return rows_of


def _reached_from(source: str, rows: int, forward: Forward, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return which inputs of the other layers depend on each output of ``source``, (rows, I) bool.

    Omits layers that no output reaches, or of which one output reaches every input.
    """
    reached: dict[str, Tensor] = {}
    for first in range(0, rows, ROWS_AT_ONCE):
        marked = torch.arange(first, min(first + ROWS_AT_ONCE, rows))
        for other, seen in _inputs_seen(source, marked, forward, layers).items():
            if bool(seen.any()):
                reached.setdefault(other, seen.new_zeros(rows, seen.shape[1]))[marked] = seen
    # An output before a norm or a residual connection reaches every input: there is nothing to cut between the two.
    return {other: seen for other, seen in reached.items() if not bool(seen.all(1).any())}


def _inputs_seen(source: str, marked: Tensor, forward: Forward, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return which inputs of the other layers are NaN if the outputs ``marked`` of ``source`` are, (marked, I) bool."""
    seen: dict[str, Tensor] = {}

    def replacement(name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        outputs = linear_shape(layer)[0]

        def replaced(x: Tensor) -> Tensor:
            y = x.new_zeros(*x.shape[:-1], outputs)
            if x[..., 0].numel() != ROWS_AT_ONCE * _TOKENS:  # such as the embeddings of relative positions
                return y
            if name == source:
                # Example i marks the output ``marked[i]``, on all of its tokens.
                y.view(ROWS_AT_ONCE, -1, outputs)[torch.arange(len(marked)), :, marked] = torch.nan
                return y
            is_nan = x.reshape(ROWS_AT_ONCE, -1, x.shape[-1]).isnan().any(1)[: len(marked)].cpu()  # (marked, I)
            if name in seen:  # a layer may run more than once
                is_nan = seen[name] | is_nan
            seen[name] = is_nan
            return y

        return replaced

    with ExitStack() as stack:
        for name, layer in layers.items():
            layer.forward = replacement(name, layer)
            stack.callback(vars(layer).pop, "forward")
        forward()
    return seen


def _rows(reached: Mapping[str, Tensor]) -> Rows | None:
    """Return the outputs that make each input of a layer, given which inputs each output of other layers reaches; None
    unless each output reaches one input, and every input has as many."""
    rows: dict[str, Tensor] = {}
    for name, seen in reached.items():
        used = seen.any(1).nonzero().flatten()  # outputs that reach an input
        if bool((seen.sum(1) > 1).any()):
            return None
        channel = seen[used].to(torch.uint8).argmax(1)  # (used,): the one input that each reaches
        counts = channel.bincount(minlength=seen.shape[1])
        if len(set(counts.tolist())) > 1:
            return None
        # sorted by channel; stable, so that the outputs of a channel stay ascending
        rows[name] = used[channel.argsort(stable=True)].view(seen.shape[1], -1)
    return rows
