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
"""Largest sum, in steps: double precision has 53 bits, of which one is left free."""
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
        """The sum, in double precision: multiples of the step, which add up without rounding."""
        self._waiting: list[list[Tensor]] = []
        """Terms before the step is known."""
        self._step = 0.0

    def add(self, parts: Iterable[Tensor]) -> None:
        """Add a term, fp32, in its parts."""
        if not self._step:
            # Not copied if it is a list: same_terms recognises layers that share a term by its tensors.
            self._waiting.append(parts if isinstance(parts, list) else list(parts))
        elif not self._parts:
            self._parts = [self._rounded(part).to(torch.float64) for part in parts]
        else:
            for total, part in zip(self._parts, parts, strict=True):
                total += self._rounded(part)

    def same_terms(self, other: Self) -> bool:
        """Return whether both have the same terms, in the same memory, and no step yet."""
        if not self._waiting or len(self._waiting) != len(other._waiting):
            return False
        return all(mine is theirs for mine, theirs in zip(self._waiting, other._waiting, strict=True))

    def settle(self, largest: float) -> None:
        """Fix the step, a power of two, by the ``largest`` value of the first batch."""
        # Inputs that are not finite make sums that are not either, with any step.
        exponent = 0
        if math.isfinite(largest):
            _, exponent = math.frexp(largest)
        self._step = 2.0 ** (exponent - _FRACTION_BITS)
        for parts in self._waiting:
            self.add(parts)
        self._waiting = []

    @property
    def largest(self) -> float:
        """The largest value of a part or of a waiting term."""
        tensors = list(self._parts)
        for parts in self._waiting:
            tensors += parts
        largest_of_each = [float(tensor.abs().amax()) for tensor in tensors]
        return max(largest_of_each, default=0.0)

    def add_ranks(self, ranks: Ranks) -> None:
        """Add the sums of all ``ranks``, which have the same parts. Collective. Raises FloatingPointError on all."""
        self._parts = [ranks.sums.all_sum(part) for part in self._parts]
        # Checked on the sum of all ranks, which is the same on each, so that all raise or none. Beyond the limit double
        # precision would round, and the sum would depend on the order.
        if self.largest >= _MOST_MULTIPLES * self._step:
            raise FloatingPointError("inputs of later samples are thousands of times as large as the first batch's")

    def whole(self) -> Tensor:
        """Return the sum: (I,), or (I, I) made of its panels; double precision."""
        if not self._step:
            self.settle(self.largest)
        if self._parts[0].dim() == 1:
            return self._parts[0]
        size = self._parts[0].shape[1]
        matrix = self._parts[0].new_empty(size, size)
        for panel in self._parts:
            height, width = panel.shape
            first = size - width  # a panel starts on the diagonal and ends at the last column
            last = first + height
            matrix[first:last, first:] = panel
            matrix[last:, first:last] = panel[:, height:].t()
        return matrix

    def _rounded(self, part: Tensor) -> Tensor:
        # The step is a power of two, so that both products are exact.
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
            total = OrderFreeSum()
            self.of[expert] = total
            if self.settled_by is not None:
                total.settle(self.settled_by)
        total.add(parts)

    @property
    def largest(self) -> float:
        """The largest value of the sums of all experts."""
        return max((total.largest for total in self.of.values()), default=0.0)

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
        zero = torch.zeros_like(next(iter(self.of.values())).whole())
        sums: list[Tensor] = []
        for expert in range(len(self.expert_tokens)):
            if expert in self.of:
                sums.append(self.of[expert].whole())
            else:
                sums.append(zero)
        return torch.stack(sums)


@dataclass(slots=True)
class InputGatherer:
    """Sum up inputs of layers. Layers that get the same tensors, such as q, k and v, share one :class:`InputSum`."""

    sum_of: SumOf
    experts: range | None = None
    """Experts of stacks whose inputs are summed; None for all."""
    sums: dict[str, InputSum] = field(default_factory=dict)
    """Sums by layer name; a layer that never ran is missing."""
    _tokens: Tensor | None = None
    """True for each token of the batch that is not padding, (batch * length,); None without padding."""
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
        # (layers, 2): the largest value, and the first layer with the same inputs; -1 for layers that did not run.
        facts = torch.full((len(names), 2), -1.0, dtype=torch.float64)
        for i, name in enumerate(names):
            if name in self.sums:
                largest = self.sums[name].bound or self.sums[name].largest
                leader = 0
                while leader < i and not self._alike(name, names[leader]):
                    leader += 1
                facts[i] = torch.tensor([largest, leader], dtype=torch.float64)
        # Every rank takes the facts of rank 0: other ranks saw other batches, and steps have to be the same everywhere.
        for i, (largest, leader) in enumerate(ranks.of_first(facts).tolist()):
            if leader == i:
                self.sums.setdefault(names[i], InputSum()).settle(largest)
            elif leader >= 0:
                # The leader comes first in the loop, so its sum is settled.
                self.sums[names[i]] = self.sums[names[int(leader)]]
                self._followers.add(names[i])

    def _alike(self, name: str, other: str) -> bool:
        """Return whether two linear layers have the same terms."""
        if name not in self.sums or other not in self.sums:
            return False
        total = self.sums[name].of.get(0)
        other_total = self.sums[other].of.get(0)
        return total is not None and other_total is not None and total.same_terms(other_total)

    def add_ranks(self, features: Mapping[str, int], device: torch.device, ranks: Ranks) -> None:
        """Add the sums of all ranks. Collective.

        ``features``: I of each layer, in the same order on all ranks.
        """
        # From here on every rank has the same layers in ``sums``, so that all of them make the same calls below.
        self._settle_late(list(features), ranks)
        done: set[int] = set()
        for name, num_features in features.items():
            sums = self.sums.get(name)
            if sums is None or id(sums) in done:  # layers that share a sum add it once
                continue
            done.add(id(sums))
            tokens = ranks.sums.all_sum(torch.tensor([sums.num_tokens, *self._tokens_of_experts(sums, ranks)]))
            sums.num_tokens = int(tokens[0])
            sums.expert_tokens = tokens[1:].tolist()
            for expert in self._experts_with_tokens(sums):
                if expert not in sums.of:  # no token of this rank, which takes part with a sum of nothing
                    sums.add(self.sum_of(torch.zeros(0, num_features, device=device)), expert)
                sums.of[expert].add_ranks(ranks)

    def _experts_with_tokens(self, sums: InputSum) -> list[int]:
        """Return the experts whose sums ranks add, by the tokens of all ranks; [0] for a linear layer."""
        if not sums.expert_tokens:
            return [0]
        num_experts = len(sums.expert_tokens)
        with_tokens: list[int] = []
        for expert in self.experts or range(num_experts):
            if expert < num_experts and sums.expert_tokens[expert]:
                with_tokens.append(expert)
        return with_tokens

    def _settle_late(self, names: Sequence[str], ranks: Ranks) -> None:
        """Fix the steps of layers that the first batch did not run, by the terms of all ranks. Collective."""
        table = torch.full((len(names),), -1.0, dtype=torch.float64)
        for i, name in enumerate(names):
            if name in self.sums:
                table[i] = self.sums[name].largest
        # (ranks, layers); each rank fills its row, so that the sum over ranks has all rows.
        tables = torch.zeros(ranks.number, len(names), dtype=torch.float64)
        tables[ranks.own] = table
        for name, largest in zip(names, ranks.sums.all_sum(tables).amax(0).tolist(), strict=True):
            # -1 if the layer ran on no rank
            if largest >= 0 and self.sums.setdefault(name, InputSum()).settled_by is None:
                self.sums[name].settle(largest)

    def _tokens_of_experts(self, sums: InputSum, ranks: Ranks) -> list[int]:
        """Return this rank's counts; zeros if it had no batch and others did. Collective."""
        num_experts = len(sums.expert_tokens)
        has_counts = int(num_experts > 0)
        totals = ranks.sums.all_sum(torch.tensor([num_experts, has_counts]))
        # Ranks with counts agree on the number of experts, so that their mean is the number.
        num_experts = int(totals[0]) // max(1, int(totals[1]))
        return sums.expert_tokens or [0] * num_experts

    @torch.no_grad()  # a sum over many batches would keep the graphs of all of them
    def _add(self, name: str, module: nn.Module, args: tuple[Tensor, *tuple[object, ...]]) -> None:
        inputs = args[0]
        if len(args) == 3 and isinstance(args[1], Routing):
            self.add_experts(name, inputs, args[1], bool(args[2]))
            return
        if name in self._followers:
            return
        rows = inputs.reshape(-1, inputs.shape[-1])
        # Another number of rows, as of experts and of relative positions' embeddings, has no padding.
        if self._tokens is not None and len(rows) == self._tokens.numel():
            rows = rows[self._tokens.to(rows.device)]
        sums = self.sums.setdefault(name, InputSum())
        sums.num_tokens += len(rows)
        if sums.settled_by is not None:
            sums.add(self.sum_of(rows))
            return
        # Until the steps are known, layers that get the same tensor in a row share its term: the sum is computed once,
        # and settle recognises them by it.
        if self._last is None or self._last[0] is not inputs:
            self._last = (inputs, list(self.sum_of(rows)))
        _, term = self._last
        sums.add(term)

    def add_experts(self, name: str, inputs: Tensor, routing: Routing, by_token: bool) -> None:
        """Add the inputs of each expert of the stack ``name``.

        ``inputs``: (N, I) ``by_token``, or (N*k, I) sorted by expert.
        """
        num_experts = len(routing.ends)
        chosen = self.experts or range(num_experts)
        sums = self.sums.setdefault(name, InputSum())
        sums.expert_tokens = sums.expert_tokens or [0] * num_experts
        if sums.settled_by is None:
            sums.bound = max(sums.bound, float(next(squares(inputs)).amax()))
        # (N*k,), sorted by expert like the pairs of tokens and experts
        real = None if self._tokens is None else self._tokens.to(inputs.device)[routing.tokens]
        for expert, rows in routing.runs():
            count = rows.stop - rows.start
            if real is not None:
                count = int(real[rows].sum())
            sums.expert_tokens[expert] += count
            if not count or expert not in chosen:
                continue
            expert_inputs = routing.rows_of(inputs, rows, by_token)  # (tokens of the expert, I)
            if real is not None:
                expert_inputs = expert_inputs[real[rows]]
            sums.add(self.sum_of(expert_inputs), expert)
        sums.num_tokens = sum(sums.expert_tokens)
