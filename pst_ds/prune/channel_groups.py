"""Find which outputs of a block's layers become which inputs of the next ones, by running it on marked values.

An output of a layer is set to NaN, and the inputs of other layers that become NaN depend on it: one channel of a
feed-forward layer, the inputs from a head, or from all heads that share keys and values. If all inputs become NaN, a
norm or a residual connection mixes them, and none can be removed. Names of modules do not matter, so fused layers and
new families need no changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pst_ds.nn.model_structure import linear_shape
from pst_ds.prune.blocks import Batch, Forward

ROWS_AT_ONCE = 64
"""Rows that a pass marks, each in its own example."""
_TOKENS = 2


@dataclass(frozen=True, slots=True)
class ChannelGroups:
    """Inputs of a layer that can only be removed together, and the outputs that make them."""

    columns: Tensor
    """(groups, size) int64: inputs of each group, ascending; the groups are in the order of their first inputs."""
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    """(groups, rows of a group) int64, ascending, by the name of the layer that has these outputs."""

    @property
    def number(self) -> int:
        return len(self.columns)

    @property
    def are_heads(self) -> bool:
        """True for groups of several inputs, which only attention has."""
        return self.columns.shape[1] > 1


def probe_batch(batch: Batch) -> Batch:
    """Return the first tokens of a batch's first example, once for each row that a pass marks."""
    key = next(key for key in ("input_ids", "inputs_embeds", *batch) if key in batch)
    first = batch[key][:1, :_TOKENS]
    return {key: first.expand(ROWS_AT_ONCE, *first.shape[1:]).contiguous()}


def find_groups(forward: Forward, layers: Mapping[str, nn.Module]) -> dict[str, ChannelGroups]:
    """Return the groups of every layer of a block that has some, by its name.

    ``forward``: runs the block on :func:`probe_batch`. ``layers``: its linear layers, by name; they compute nothing.
    """
    reached: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        for other, found in _reached_from(name, linear_shape(layer)[0], forward, layers).items():
            reached.setdefault(other, {})[name] = found
    groups = {other: _groups(by_layer) for other, by_layer in reached.items()}
    return {other: found for other, found in groups.items() if found is not None}


def _reached_from(source: str, rows: int, forward: Forward, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return which inputs of the other layers depend on each output of ``source``, (rows, I) bool.

    Omits layers that no output reaches, or of which one output reaches every input.
    """
    found: dict[str, Tensor] = {}
    for first in range(0, rows, ROWS_AT_ONCE):
        marked = torch.arange(first, min(first + ROWS_AT_ONCE, rows))
        for other, seen in _inputs_seen(source, marked, forward, layers).items():
            if bool(seen.any()):
                found.setdefault(other, seen.new_zeros(rows, seen.shape[1]))[marked] = seen
    return {other: seen for other, seen in found.items() if not bool(seen.all(1).any())}


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
                y.view(ROWS_AT_ONCE, -1, outputs)[torch.arange(len(marked)), :, marked] = torch.nan
            else:
                isnan = x.reshape(ROWS_AT_ONCE, -1, x.shape[-1]).isnan().any(1)[: len(marked)].cpu()
                seen[name] = seen[name] | isnan if name in seen else isnan
            return y

        return replaced

    with ExitStack() as stack:
        for name, layer in layers.items():
            layer.forward = replacement(name, layer)
            stack.callback(vars(layer).pop, "forward")
        forward()
    return seen


def _groups(reached: Mapping[str, Tensor]) -> ChannelGroups | None:
    """Return the groups of a layer, given which of its inputs each output of other layers reaches; None if its inputs
    cannot be split into groups of equal size that come from equal numbers of outputs."""
    number = next(iter(reached.values())).shape[1]
    label = torch.arange(number)
    while True:
        before = label.clone()
        for seen in reached.values():
            for row in seen[seen.sum(1) > 1]:
                label[row] = label[row].min()
        if torch.equal(label, before):
            break
    firsts, sizes = label.unique(return_counts=True)
    if len(firsts) < 2 or len(set(sizes.tolist())) > 1:
        return None
    columns = label.argsort(stable=True).view(len(firsts), -1)
    rows = {}
    for name, seen in reached.items():
        used = seen.any(1).nonzero().flatten()
        of_row = label[seen[used].to(torch.uint8).argmax(1)]
        order = of_row.argsort(stable=True)
        counts = of_row.unique(return_counts=True)[1]
        if len(counts) != len(firsts) or len(set(counts.tolist())) > 1:
            return None
        rows[name] = used[order].view(len(firsts), -1)
    return ChannelGroups(columns, rows)
