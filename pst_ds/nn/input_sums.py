"""Sums of squares, or of products, of the inputs of layers over all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pst_ds.core.experts.routing import Routing


def squares(inputs: Tensor) -> Tensor:
    """Sum the squares of inputs (tokens, I) of any float dtype over the tokens: (I,), double precision."""
    return inputs.to(torch.float32).square().sum(0).to(torch.float64)


def products(inputs: Tensor) -> Tensor:
    """Return X'X of inputs X, (tokens, I), of any float dtype: (I, I) fp32."""
    inputs = inputs.to(torch.float32)
    return inputs.t() @ inputs


@dataclass(slots=True)
class InputSum:
    """A sum over all inputs of a layer, or of each expert of a stack."""

    num_tokens: int = 0
    total: Tensor | None = None
    """The sum; (experts, ...) for a stack, 0 for experts without tokens."""
    expert_tokens: list[int] = field(default_factory=list)
    """Tokens of each expert of a stack, including experts that are not summed."""

    def add(self, part: Tensor, num_tokens: int) -> None:
        """Add the sum over ``num_tokens`` more, which other layers may share."""
        self.num_tokens += num_tokens
        self.total = part.clone() if self.total is None else self.total.add_(part)


@dataclass(slots=True)
class InputGatherer:
    """Sum up inputs of layers. A tensor that several layers share, such as q, k and v, is summed once."""

    sum_of: Callable[[Tensor], Tensor]
    """:func:`squares` or :func:`products`."""
    gated: bool = False
    """True if an expert's inputs are first multiplied by the router's gate of the token."""
    experts: range | None = None
    """Experts of stacks whose inputs are summed; None for all."""
    sums: dict[str, InputSum] = field(default_factory=dict)
    """Sums by layer name; a layer that never ran is missing."""
    _tokens: Tensor | None = None
    _last: tuple[Tensor, Tensor, int] | None = None
    """(inputs, their sum, tokens) of the layer that ran last."""

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """Set the batch that runs next. Its optional ``attention_mask`` (batch, length) is 0 for padding."""
        mask = batch.get("attention_mask")
        self._tokens = None if mask is None else mask.flatten().bool()

    @contextmanager
    def listening(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Add the inputs of these layers, by name, in the context."""
        hooks = [layer.register_forward_pre_hook(partial(self._add, name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            self._last = None
            for hook in hooks:
                hook.remove()

    @torch.no_grad()  # a sum over many batches would keep the graphs of all of them
    def _add(self, name: str, module: nn.Module, args: tuple[Tensor, *tuple[object, ...]]) -> None:
        inputs = args[0]
        if len(args) == 3 and isinstance(args[1], Routing):
            self.add_experts(name, inputs, args[1], bool(args[2]))
            return
        if self._last is None or self._last[0] is not inputs:
            rows = inputs.reshape(-1, inputs.shape[-1])
            # another number of rows, as of experts and of relative positions' embeddings, has no padding
            if self._tokens is not None and len(rows) == self._tokens.numel():
                rows = rows[self._tokens.to(rows.device)]
            self._last = inputs, self.sum_of(rows), len(rows)
        self.sums.setdefault(name, InputSum()).add(*self._last[1:])

    def add_experts(self, name: str, inputs: Tensor, routing: Routing, by_token: bool) -> None:
        """Add the inputs of each expert of the stack ``name``.

        ``inputs``: (N, I) ``by_token``, or (N*k, I) sorted by expert.
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
            if sums.total is None:
                sums.total = part.new_zeros(len(chosen), *part.shape)
            sums.total[expert - chosen.start] += part
        sums.num_tokens = sum(sums.expert_tokens)
