"""Sums of squares, or of products, of the inputs of layers over all tokens: bit-identical in every order.

Each part of a sum is rounded to a multiple of a power of two, which the first batch fixes, and added in double
precision without rounding. Ranks can therefore sum different batches.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from pst_ds.core.experts.routing import Routing
from pst_ds.core.one_shot.shares import ALONE, Ranks

_FRACTION_BITS = 34
"""Parts are rounded to 2**-34 of the first batch's largest value: finer than fp32's rounding of the product itself."""
_MOST_MULTIPLES = 2.0**52
_COLUMNS = 256
"""Columns of X that are multiplied at once."""

SumOf = Callable[[Tensor], Iterator[Tensor]]
""":func:`squares`, :func:`products` or :func:`totals`."""


def squares(inputs: Tensor) -> Iterator[Tensor]:
    """Yield the sum of the squares of inputs (tokens, I) of any float dtype over the tokens: (I,) fp32."""
    yield inputs.to(torch.float32).square().sum(0, dtype=torch.float32)


def products(inputs: Tensor) -> Iterator[Tensor]:
    """Yield X'X of inputs X, (tokens, I), fp32, in panels: rows a to b, columns a to I; the rest mirrors them."""
    inputs = inputs.to(torch.float32)
    for first in range(0, inputs.shape[1], _COLUMNS):
        yield inputs[:, first : first + _COLUMNS].t() @ inputs[:, first:]


def totals(inputs: Tensor) -> Iterator[Tensor]:
    """Yield the sum of inputs (tokens, I) over the tokens: (I,) fp32."""
    yield inputs.to(torch.float32).sum(0)


class OrderFreeSum:
    """A sum of tensors, in parts, that does not depend on the order of its terms."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        """Double precision, multiples of the step."""
        self._waiting: list[list[Tensor]] = []
        """Terms before the step is known."""
        self._step = 0.0

    def add(self, parts: Iterable[Tensor]) -> None:
        """Add a term, fp32, in its parts."""
        if not self._step:
            self._waiting.append(parts if isinstance(parts, list) else list(parts))
        elif not self._parts:
            self._parts = [self._rounded(part).to(torch.float64) for part in parts]
        else:
            for total, part in zip(self._parts, parts, strict=True):
                total += self._rounded(part)

    def same_terms(self, other: Self) -> bool:
        """Return whether both have the same terms, in the same memory, and no step yet."""
        pairs = zip(self._waiting, other._waiting, strict=False)
        return len(self._waiting) == len(other._waiting) > 0 and all(one is two for one, two in pairs)

    def settle(self, largest: float) -> None:
        """Fix the step, a power of two, by the ``largest`` value of the first batch."""
        exponent = math.frexp(largest)[1] if math.isfinite(largest) else 0
        self._step = 2.0 ** (exponent - _FRACTION_BITS)
        for parts in self._waiting:
            self.add(parts)
        self._waiting = []

    @property
    def largest(self) -> float:
        """The largest value of a part or of a waiting term."""
        every = [*self._parts, *(part for parts in self._waiting for part in parts)]
        return max((float(part.abs().amax()) for part in every), default=0.0)

    def add_ranks(self, ranks: Ranks) -> None:
        """Add the sums of all ``ranks``, which have the same parts. Collective. Raises FloatingPointError on all."""
        self._parts = [ranks.sums.all_sum(part) for part in self._parts]
        if self.largest >= _MOST_MULTIPLES * self._step:
            raise FloatingPointError("inputs of later samples are thousands of times as large as the first batch's")

    def whole(self) -> Tensor:
        """Return the sum: (I,), or (I, I) made of its panels; double precision."""
        if not self._step:
            self.settle(self.largest)
        parts = self._parts
        if parts[0].dim() == 1:
            return parts[0]
        size = parts[0].shape[1]
        found = parts[0].new_empty(size, size)
        for part in parts:
            first, last = size - part.shape[1], size - part.shape[1] + part.shape[0]
            found[first:last, first:] = part
            found[last:, first:last] = part[:, last - first :].t()
        return found

    def _rounded(self, part: Tensor) -> Tensor:
        return part.mul(1.0 / self._step).round_().mul_(self._step)


@dataclass(slots=True)
class InputSum:
    """A sum over all inputs of a layer, or of each expert of a stack."""

    num_tokens: int = 0
    of: dict[int, OrderFreeSum] = field(default_factory=dict)
    """Sums by expert, of those with tokens; by 0 for a linear layer."""
    expert_tokens: list[int] = field(default_factory=list)
    """Tokens of each expert of a stack, including experts that are not summed."""
    settled_by: float | None = None
    """Largest value of the first batch, once known."""
    bound: float = 0.0
    """Largest sum of squares of an input of a stack over all its experts, which does not depend on those summed."""

    def add(self, parts: Iterable[Tensor], expert: int = 0) -> None:
        """Add the term of a batch."""
        total = self.of.get(expert)
        if total is None:
            total = self.of[expert] = OrderFreeSum()
            if self.settled_by is not None:
                total.settle(self.settled_by)
        total.add(parts)

    def settle(self, largest: float) -> None:
        self.settled_by = largest
        for total in self.of.values():
            total.settle(largest)

    @property
    def total(self) -> Tensor | None:
        """The sum of a linear layer; (experts, ...) of a stack, 0 for experts without tokens; None without any."""
        if not self.of:
            return None
        if not self.expert_tokens:
            return self.of[0].whole()
        some = next(iter(self.of.values())).whole()
        number = range(len(self.expert_tokens))
        return torch.stack([self.of[i].whole() if i in self.of else torch.zeros_like(some) for i in number])


@dataclass(slots=True)
class InputGatherer:
    """Sum up inputs of layers. Layers that get the same tensors, such as q, k and v, share one :class:`InputSum`."""

    sum_of: SumOf
    experts: range | None = None
    """Experts of stacks whose inputs are summed; None for all."""
    sums: dict[str, InputSum] = field(default_factory=dict)
    """Sums by layer name; a layer that never ran is missing."""
    _tokens: Tensor | None = None
    _last: tuple[Tensor, list[Tensor]] | None = None
    """Inputs of the layer that ran last, and their term, before the steps are known."""
    _followers: set[str] = field(default_factory=set)
    """Layers whose inputs are added by another that shares their sum."""

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """Set the batch that runs next. Its optional ``attention_mask`` (batch, length) is 0 for padding."""
        mask = batch.get("attention_mask")
        self._tokens = None if mask is None else mask.flatten().bool()

    @contextmanager
    def listening(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Add the inputs of these layers, by name, in the context."""
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(partial(self._add, name)))
            yield
        self._last = None

    def settle(self, names: Sequence[str], ranks: Ranks = ALONE) -> None:
        """Fix the steps of the sums, and which layers share one, after the first batch of rank 0. Collective."""
        facts = torch.full((len(names), 2), -1.0, dtype=torch.float64)
        for i, name in enumerate(names):
            if name in self.sums:
                own = self.sums[name]
                largest = own.bound or max((one.largest for one in own.of.values()), default=0.0)
                leader = next(j for j, other in enumerate(names) if j == i or self._alike(name, other))
                facts[i] = torch.tensor([largest, leader], dtype=torch.float64)
        for i, (largest, leader) in enumerate(ranks.of_first(facts).tolist()):
            if leader == i:
                self.sums.setdefault(names[i], InputSum()).settle(largest)
            elif leader >= 0:
                self.sums[names[i]] = self.sums[names[int(leader)]]
                self._followers.add(names[i])

    def _alike(self, name: str, other: str) -> bool:
        """Return whether two linear layers have the same terms."""
        one, two = (self.sums[n].of.get(0) if n in self.sums else None for n in (name, other))
        return one is not None and two is not None and one.same_terms(two)

    def add_ranks(self, features: Mapping[str, int], device: torch.device, ranks: Ranks) -> None:
        """Add the sums of all ranks. Collective.

        ``features``: I of each layer, in the same order on all ranks.
        """
        self._settle_late(list(features), ranks)
        done = set[int]()
        for name, number in features.items():
            sums = self.sums.get(name)
            if sums is None or id(sums) in done:
                continue
            done.add(id(sums))
            tokens = ranks.sums.all_sum(torch.tensor([sums.num_tokens, *self._tokens_of_experts(sums, ranks)]))
            sums.num_tokens, sums.expert_tokens = int(tokens[0]), tokens[1:].tolist()
            chosen = [i for i in self.experts or range(len(sums.expert_tokens)) if i < len(sums.expert_tokens)]
            for expert in chosen if sums.expert_tokens else (0,):
                if sums.expert_tokens and not sums.expert_tokens[expert]:
                    continue
                if expert not in sums.of:
                    sums.add(self.sum_of(torch.zeros(0, number, device=device)), expert)
                sums.of[expert].add_ranks(ranks)

    def _settle_late(self, names: Sequence[str], ranks: Ranks) -> None:
        """Fix the steps of layers that the first batch did not run, by the terms of all ranks. Collective."""
        table = torch.full((len(names),), -1.0, dtype=torch.float64)
        for i, name in enumerate(names):
            if name in self.sums:
                table[i] = max((one.largest for one in self.sums[name].of.values()), default=0.0)
        every = torch.zeros(ranks.number, len(names), dtype=torch.float64)
        every[ranks.own] = table
        for name, largest in zip(names, ranks.sums.all_sum(every).amax(0).tolist(), strict=True):
            if largest >= 0 and self.sums.setdefault(name, InputSum()).settled_by is None:
                self.sums[name].settle(largest)

    def _tokens_of_experts(self, sums: InputSum, ranks: Ranks) -> list[int]:
        """Return this rank's counts; zeros if it had no batch and others did. Collective."""
        numbers = ranks.sums.all_sum(torch.tensor([len(sums.expert_tokens), 1 if sums.expert_tokens else 0]))
        number = int(numbers[0]) // max(1, int(numbers[1]))
        return sums.expert_tokens or [0] * number

    @torch.no_grad()  # a sum over many batches would keep the graphs of all of them
    def _add(self, name: str, module: nn.Module, args: tuple[Tensor, *tuple[object, ...]]) -> None:
        inputs = args[0]
        if len(args) == 3 and isinstance(args[1], Routing):
            self.add_experts(name, inputs, args[1], bool(args[2]))
            return
        if name in self._followers:
            return
        rows = inputs.reshape(-1, inputs.shape[-1])
        # another number of rows, as of experts and of relative positions' embeddings, has no padding
        if self._tokens is not None and len(rows) == self._tokens.numel():
            rows = rows[self._tokens.to(rows.device)]
        sums = self.sums.setdefault(name, InputSum())
        sums.num_tokens += len(rows)
        if sums.settled_by is not None:
            sums.add(self.sum_of(rows))
            return
        if self._last is None or self._last[0] is not inputs:
            self._last = inputs, list(self.sum_of(rows))
        sums.add(self._last[1])

    def add_experts(self, name: str, inputs: Tensor, routing: Routing, by_token: bool) -> None:
        """Add the inputs of each expert of the stack ``name``.

        ``inputs``: (N, I) ``by_token``, or (N*k, I) sorted by expert.
        """
        number = len(routing.ends)
        chosen, sums = self.experts or range(number), self.sums.setdefault(name, InputSum())
        sums.expert_tokens = sums.expert_tokens or [0] * number
        if sums.settled_by is None:
            sums.bound = max(sums.bound, float(next(squares(inputs)).amax()))
        real = None if self._tokens is None else self._tokens.to(inputs.device)[routing.tokens]
        for expert, rows in routing.runs():
            is_real = None if real is None else real[rows]
            count = rows.stop - rows.start if is_real is None else int(is_real.sum())
            sums.expert_tokens[expert] += count
            if not count or expert not in chosen:
                continue
            given = routing.rows_of(inputs, rows, by_token)
            sums.add(self.sum_of(given if is_real is None else given[is_real]), expert)
        sums.num_tokens = sum(sums.expert_tokens)
