"""Scores of experts while a model computes: the contribution of each to the outputs, as in REAP (arXiv 2510.13999)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from pst_ds.core.experts.routing import Routing
from pst_ds.nn import experts as registered
from pst_ds.nn.model_structure import ExpertsModule, stack_names

_UNIT = 2.0**-28
"""Terms of the sums are rounded to multiples of it, so that int64 sums are exact and do not depend on their order."""


class ExpertScores:
    """Sums of g ||f(x)|| over the tokens of each expert; g is the token's router gate, f(x) the expert's output.

    Args:
        modules: experts modules of one model by name, whose computation :meth:`listening` replaces.
    """

    def __init__(self, modules: Mapping[str, ExpertsModule]):
        self._names: dict[ExpertsModule, str] = {}
        self._of_rank: dict[str, Tensor] = {}
        """For each module (2, E): sums over this rank's tokens in units, and numbers of tokens."""
        self.sums: dict[str, Tensor] = {}
        """The same over all ranks, up to the last :meth:`add_up`; on the CPU."""
        for name, module in modules.items():
            self._names[module] = name
            self._of_rank[name] = torch.zeros(2, int(module.num_experts), dtype=torch.int64)
            self.sums[name] = self._of_rank[name].clone()
        self._real: Tensor | None = None

    def expect(self, batch: Mapping[str, Tensor]) -> None:
        """Set the micro-batch that runs next. Its optional ``attention_mask`` is 0 for padding."""
        mask = batch.get("attention_mask")
        self._real = None if mask is None else mask.flatten().bool()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Add the tokens of forward passes in the context; a bypassed model adds none."""

        @torch.compiler.disable
        def forward(experts: ExpertsModule, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            routing = Routing.of(index, weights, experts.num_experts)
            stack = getattr(experts, stack_names(experts)[0])
            after = None
            if not getattr(stack, "bypassed", False):  # bypassed in the teacher's pass, or another one with W0
                after = partial(self._add, self._names[experts], routing)
            return registered.of_routing(experts, hidden, weights, routing, after=after)

        with registered.registered(forward):
            yield

    @torch.no_grad()
    def _add(self, name: str, routing: Routing, outputs: Tensor) -> None:
        """Add ``outputs``, (N*k, H) in the order of the experts."""
        sizes = torch.linalg.vector_norm(outputs.float(), dim=1) * routing.gates.abs().float()  # (N*k,)
        terms = torch.stack([(sizes / _UNIT).round().long(), torch.ones_like(routing.experts)])  # (2, N*k)
        if self._real is not None and len(self._real) == len(routing.places):  # ranks may share sequences
            terms *= self._real.to(terms.device)[routing.tokens]
        # From the first call on, the sums stay on the device of the computation: the host does not wait for each batch.
        self._of_rank[name] = self._of_rank[name].to(terms.device).index_add_(1, routing.experts, terms)

    def add_up(self, all_sum: Callable[[Tensor], Tensor], names: Sequence[str] | None = None) -> None:
        """Move the terms of modules, by default of all, from all ranks to :attr:`sums`. Collective."""
        if names is None:
            names = list(self.sums)
        terms = [self._of_rank[name].flatten().cpu() for name in names]
        lengths = list(map(len, terms))
        totals = all_sum(torch.cat(terms))  # one collective for all modules
        for name, total in zip(names, totals.split(lengths), strict=True):
            self.sums[name] += total.view(2, -1)
            self._of_rank[name].zero_()  # so that the next call does not add them again

    def scores(self, name: str) -> Tensor:
        """Return the mean of g ||f(x)|| over the tokens of each expert, (E,) double; 0 without a token."""
        total, tokens = self.sums[name]
        return total.double() * _UNIT / tokens.clamp(min=1)


def highest(scores: Tensor, number: int) -> Tensor:
    """Return the indices of the ``number`` highest ``scores``, ascending. Among equal ones the first are dropped."""
    return scores.argsort(stable=True)[len(scores) - number :].sort().values
