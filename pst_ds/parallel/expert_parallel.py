"""Expert parallelism: each rank of a group owns some experts of every stack, and tokens travel to them and back.

DeepSpeed's ZeRO-3 treats the owned parts as it does AutoEP's: it partitions them over the ranks that own the same
experts, averages their gradients over the tokens of all ranks, and adds their norms over the group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pst_ds.core.bits import shard_range
from pst_ds.core.experts.routing import Routing
from pst_ds.parallel import sharding
from pst_ds.parallel.sharding import ExpertShare

Compute = Callable[[Tensor, Routing], Tensor]
"""Returns the outputs of experts, (M*k, H) sorted by expert, for tokens (M, H) and their routing."""


@dataclass(frozen=True, slots=True)
class ExpertGroup(ExpertShare):
    """A group of neighbouring ranks, and this rank's share of the experts."""

    ranks: dist.ProcessGroup

    @classmethod
    def of_neighbours(cls, degree: int) -> Self:
        """Group ``degree`` ranks each, which must divide the number of ranks. Collective."""
        from deepspeed.utils import groups

        groups._create_expert_and_data_parallel(degree)  # once for each degree
        name = f"ep_size_{degree}"
        ranks = groups._get_expert_parallel_group(name)
        return cls(
            degree=degree,
            position=dist.get_rank(ranks),
            name=name,
            owners=groups._get_expert_data_parallel_group(name),
            ranks=ranks,
        )

    @torch.no_grad()
    def own_experts(self, stack: nn.Parameter) -> nn.Parameter:
        """Return this rank's experts of ``stack``, which ZeRO-3 partitions over all ranks and which is freed.

        ``stack``: (E, ...). The result is frozen, (E / degree, ...), and partitioned over its owners. Collective; needs
        memory for twice its values while it runs.
        """
        shard_values = sharding.shard_of(stack).values
        numel = sharding.full_numel(stack)
        world = sharding.num_shards(stack)
        rank = sharding.shard_index(stack)
        share = numel // self.degree

        def common(shard: int, position: int) -> slice:
            """Return the values of a shard that are of the experts at a position."""
            start, stop = shard_range(numel, world, shard)
            first = min(max(position * share, start), stop)
            last = min(max((position + 1) * share, start), stop)
            return slice(first - start, last - start)

        # groups are neighbours, so rank r of all has position r % degree in its own
        sent = [shard_values[common(rank, other % self.degree)] for other in range(world)]
        received: list[int] = []
        for shard in range(world):
            part_of_shard = common(shard, self.position)
            received.append(part_of_shard.stop - part_of_shard.start)
        rows = torch.cat(sent).unsqueeze(1)  # (values, 1)
        ranks = sharding.process_group(stack)
        if dist.get_backend(ranks) == "nccl":  # the shard may be in host memory
            rows = rows.cuda()
        # pieces arrive by shard, and shards are in the order of the flat index, so they join to this rank's experts
        values = _all_to_all(rows, sent=list(map(len, sent)), received=received, ranks=ranks)
        shape = sharding.full_shape(stack)
        part = nn.Parameter(values.view(shape[0] // self.degree, *shape[1:]), requires_grad=False)
        # marked first: ZeRO-3 looks at the mark to choose the ranks that it partitions over
        self.mark([part])
        stack.convert_to_zero_parameters(param_list=[part])  # type: ignore[attr-defined]
        sharding.drop(stack)
        return part

    def at_experts(self, hidden: Tensor, home: Routing, compute: Compute) -> Tensor:
        """Send each token to its experts, ``compute`` there, and return the outputs, (N*k, H) sorted by expert.

        ``hidden``: (N, H). ``home``: its experts among those of all ranks. Collective, also in the backward pass; the
        host waits for the numbers of tokens.
        """
        counts = home.tokens_of_experts.view(self.degree, -1)  # (ranks, experts of a rank)
        one_row = [1] * self.degree
        # row r of it: how many tokens rank r sends to each of this rank's experts
        arriving = _all_to_all(counts, sent=one_row, received=one_row, ranks=self.ranks)
        # both in one tensor, so that the host waits once
        sent, received = torch.stack([counts, arriving]).sum(2).tolist()
        num_experts = counts.shape[1]
        total = sum(received)  # with the total the host need not wait again
        # tokens arrive by rank, and from each rank sorted by expert
        experts = torch.arange(num_experts, device=hidden.device).repeat(self.degree)
        expert = experts.repeat_interleave(arriving.flatten(), output_size=total).unsqueeze(1)  # (total, 1)
        gates = home.weights.new_ones(total, 1)  # gates are applied at home
        trip = _Trip(
            home=home, away=Routing.of(expert, gates, num_experts), sent=sent, received=received, ranks=self.ranks
        )
        return _Return.apply(compute(_Leave.apply(hidden, trip), trip.away), trip)


@dataclass(frozen=True, slots=True)
class _Trip:
    """Tokens on their way: their routing at home, that of the tokens which arrive here, and the rows per rank."""

    home: Routing
    away: Routing
    sent: list[int]
    received: list[int]
    ranks: dist.ProcessGroup

    def out(self, rows: Tensor) -> Tensor:
        """Return the rows that arrive, by rank, for this rank's ``rows`` (N*k, H) sorted by expert. Collective."""
        return _all_to_all(rows, sent=self.sent, received=self.received, ranks=self.ranks)

    def back(self, rows: Tensor) -> Tensor:
        """Undo :meth:`out`. Collective."""
        return _all_to_all(rows, sent=self.received, received=self.sent, ranks=self.ranks)


class _Leave(torch.autograd.Function):
    """Copy each token to the ranks of its k experts; its gradient is the sum of theirs, in the router's order."""

    @staticmethod
    def forward(ctx, hidden, trip):
        ctx.trip = trip
        return trip.out(hidden[trip.home.tokens])

    @staticmethod
    def backward(ctx, grad):
        return ctx.trip.home.summed(ctx.trip.back(grad)), None


class _Return(torch.autograd.Function):
    """Return outputs that are sorted by the experts of this rank to where their tokens came from."""

    @staticmethod
    def forward(ctx, outputs, trip):
        ctx.trip = trip
        return trip.back(trip.away.summed(outputs))

    @staticmethod
    def backward(ctx, grad):
        return ctx.trip.out(grad)[ctx.trip.away.tokens], None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], ranks: dist.ProcessGroup | None) -> Tensor:
    """Send ``rows`` (n, width), the first ``sent[0]`` to rank 0 of ``ranks`` and so on; return those received."""
    arrived = rows.new_empty(sum(received), rows.shape[1])
    # as bytes, for all dtypes and backends
    dist.all_to_all_single(arrived.view(torch.uint8), rows.contiguous().view(torch.uint8), received, sent, group=ranks)
    return arrived
