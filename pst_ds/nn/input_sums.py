"""Sums of squares, or of products, of the inputs of layers over all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pst_ds.core.experts.routing import Routing


def squares(inputs: Tensor) -> Tensor:
    """Sum the squares of inputs (tokens, I) of any float dtype over the tokens: (I,), double precision."""
    return inputs.to(torch.float32).square().sum(0).to(torch.float64)


def products(inputs: Tensor) -> Tensor:
    """X'X of inputs X, (tokens, I), of any float dtype: (I, I) fp32."""
    inputs = inputs.to(torch.float32)
    return inputs.t() @ inputs


@dataclass(slots=True)
class InputSum:
    """A sum over all that a layer was given; of a stack of experts one for each expert, below the other."""

    num_tokens: int = 0
    total: Tensor | None = None
    """Of a stack (experts, ...), zeros for those without tokens."""
    expert_tokens: list[int] = field(default_factory=list)
    """Of a stack: the tokens of each of its experts, also of those that are not summed."""

    def add(self, part: Tensor, num_tokens: int) -> None:
        """``part`` is the sum over ``num_tokens`` more; it may be added to other layers' sums too."""
        self.num_tokens += num_tokens
        self.total = part.clone() if self.total is None else self.total.add_(part)

    def add_expert(self, place: int, part: Tensor, num_places: int) -> None:
        """``part`` is one more sum of the expert that comes at ``place`` of ``num_places``."""
        if self.total is None:
            self.total = part.new_zeros(num_places, *part.shape)
        self.total[place] += part


@dataclass(slots=True)
class InputGatherer:
    """Sums up what layers are given. Of one tensor that several are given, as q, k and v are, the sum is made once."""

    sum_of: Callable[[Tensor], Tensor]
    """:func:`squares` or :func:`products`."""
    gated: bool = False
    """Whether an expert's inputs are first multiplied by what the router gives the token there."""
    experts: range | None = None
    """The experts of stacks whose inputs are summed; None: all."""
    sums: dict[str, InputSum] = field(default_factory=dict)
    """By the name of the layer; a layer that never ran has none."""
    _tokens: Tensor | None = None
    _last: tuple[Tensor, Tensor, int] | None = None
    """(inputs, their sum, tokens) of the layer that ran last."""

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """``batch`` is what runs next. Its ``attention_mask`` (batch, length), if it has one, is 0 for padding."""
        mask = batch.get("attention_mask")
        self._tokens = None if mask is None else mask.flatten().bool()

    @contextmanager
    def listening(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Adds what these layers, by name, are given while the context lasts."""
        hooks = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            self._last = None
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        @torch.no_grad()  # a sum over many batches would keep the graphs of all of them
        def take(module: object, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            if len(args) > 1 and isinstance(args[1], Routing):
                self.add_experts(name, *args)
                return
            if self._last is None or self._last[0] is not inputs:
                rows = self._without_padding(inputs)
                self._last = inputs, self.sum_of(rows), len(rows)
            self.sums.setdefault(name, InputSum()).add(*self._last[1:])

        return take

    def add_experts(self, name: str, inputs: Tensor, routing: Routing, by_token: bool) -> None:
        """Add what each expert of the stack ``name`` is given.

        ``inputs``: (N, I) ``by_token``, or (N*k, I) in the order of the experts.
        """
        number = len(routing.counts)
        chosen, sums = self.experts or range(number), self.sums.setdefault(name, InputSum())
        sums.expert_tokens = sums.expert_tokens or [0] * number
        for expert, rows in routing.runs():
            is_real = None if self._tokens is None else self._tokens.to(inputs.device)[routing.tokens[rows]]
            count = rows.stop - rows.start if is_real is None else int(is_real.sum())
            sums.expert_tokens[expert] += count
            if not count or expert not in chosen:
                continue
            given = routing.rows_of(inputs, rows, by_token)
            if self.gated:
                given = given * routing.gates[rows].unsqueeze(1)
            part = self.sum_of(given if is_real is None else given[is_real])
            sums.add_expert(expert - chosen.start, part, len(chosen))
        sums.num_tokens = sum(sums.expert_tokens)

    def _without_padding(self, inputs: Tensor) -> Tensor:
        """(tokens, I) of inputs (batch, length, I), or of the same flattened.

        Of another number of rows, as experts have them, and embeddings of relative positions, all count.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self._tokens is None or len(rows) != self._tokens.numel():
            return rows
        return rows[self._tokens.to(rows.device)]
