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
    """A sum over all that a layer was given."""

    num_tokens: int = 0
    total: Tensor | None = None

    def add(self, part: Tensor, num_tokens: int) -> None:
        """``part`` is the sum over ``num_tokens`` more; it may be added to other layers' sums too."""
        self.num_tokens += num_tokens
        self.total = part.clone() if self.total is None else self.total.add_(part)


@dataclass(slots=True)
class InputGatherer:
    """Sums up what layers are given. Of one tensor that several are given, as q, k and v are, the sum is made once."""

    sum_of: Callable[[Tensor], Tensor]
    """:func:`squares` or :func:`products`; for a stack of experts the former."""
    gated: bool = False
    """Whether an expert's inputs are first multiplied by what the router gives the token there."""
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
        def take(module: object, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            if len(args) > 1 and isinstance(args[1], Routing):
                self.sums.setdefault(name, InputSum()).add(self._by_expert(*args), len(inputs))
                return
            if self._last is None or self._last[0] is not inputs:
                rows = self._without_padding(inputs)
                self._last = inputs, self.sum_of(rows), len(rows)
            self.sums.setdefault(name, InputSum()).add(*self._last[1:])

        return take

    def _by_expert(self, inputs: Tensor, routing: Routing, by_token: bool) -> Tensor:
        """The sums of each expert's inputs, one after the other, (E*I,); zeros for one without tokens."""
        sums = torch.zeros(len(routing.counts), inputs.shape[1], dtype=torch.float64, device=inputs.device)
        for expert, rows in routing.runs():
            given = routing.rows_of(inputs, rows, by_token)
            if self.gated:
                given = given * routing.gates[rows].unsqueeze(1)
            if self._tokens is not None:
                given = given[self._tokens.to(given.device)[routing.tokens[rows]]]
            sums[expert] = self.sum_of(given)
        return sums.flatten()

    def _without_padding(self, inputs: Tensor) -> Tensor:
        """(tokens, I) of inputs (batch, length, I), or of the same flattened.

        Of another number of rows, as experts have them, and embeddings of relative positions, all count.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        if self._tokens is None or len(rows) != self._tokens.numel():
            return rows
        return rows[self._tokens.to(rows.device)]
