"""Ranks of the process group and collectives over them; without a group, this process is rank 0 of 1."""

import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pst_ds.core.one_shot.shares import ALONE, Ranks
from pst_ds.core.select import RankSums
from pst_ds.errors import InputError
from pst_ds.parallel import sharding
from pst_ds.progress import heard_by

T = TypeVar("T")
_WAITING_SECONDS = 0.5
"""Time between two messages of whether a rank's long work has ended."""
_BEAT_SECONDS = 10.0
"""Shortest time between two progress messages of long work."""


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks. Collective."""
    if dist.is_initialized():
        dist.barrier()


def all_gather_objects(value: T) -> list[T]:
    """Return the ``value`` of every rank, in order. Collective."""
    if not dist.is_initialized():
        return [value]
    gathered = [value] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def of_main(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0; return its result, or raise its InputError or OSError, on every rank. Collective."""
    return of_rank(0, action)


def of_rank(source: int, action: Callable[[], T], kinds: tuple[type[Exception], ...] = (InputError, OSError)) -> T:
    """Run ``action`` on a rank; return its result, or raise its error of these ``kinds``, on every rank. Collective."""
    # the result and the error travel in one broadcast: the other ranks do not know which to expect
    outcome: list[object] = [None, None]
    if rank() == source:
        try:
            outcome[0] = action()
        except kinds as error:
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome, source)
    result, problem = outcome
    if isinstance(problem, Exception):
        raise problem
    return result  # type: ignore[return-value]


def of_main_at_length(action: Callable[[], T]) -> T:
    """Do the same as :func:`of_main` for work that takes longer than a collective may wait. Collective.

    The other ranks wait again whenever the work reports its :class:`~pst_ds.progress.Progress`.
    """
    if not is_main():
        while _continues(True):
            pass
        return of_main(action)
    last = time.monotonic()

    def report() -> None:
        nonlocal last
        if time.monotonic() - last >= _BEAT_SECONDS:
            last = time.monotonic()
            _continues(True)

    def reported() -> T:
        try:
            with heard_by(report):
                return action()
        finally:
            _continues(False)

    return of_main(reported)


def _continues(on_main: bool) -> bool:
    outcome = [on_main]
    if world_size() > 1:
        dist.broadcast_object_list(outcome, 0)
    return outcome[0]


def on_all_ranks_at_length(action: Callable[[], object]) -> None:
    """Run ``action``, without collectives, on every rank, for work that takes longer than a collective may wait.

    Collective. The action runs on a thread, while its rank tells the others whether it has ended. Raises InputError and
    OSError as :func:`raise_on_all_ranks`.
    """
    if world_size() == 1:
        action()
        return
    problems: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ended = [False]
    while not all(ended):
        thread.join(_WAITING_SECONDS)
        ended = all_gather_objects(not thread.is_alive())

    def raise_problem() -> None:
        if problems:
            raise problems[0]

    raise_on_all_ranks(raise_problem, (InputError, OSError))


def all_gather_numbers(value: Tensor) -> Tensor:
    """Return the ``value`` of every rank, all of one shape, on its device: (world size, *shape). Collective."""
    if not dist.is_initialized():
        return value.unsqueeze(0)
    gathered = value.new_empty(world_size(), *value.shape)
    dist.all_gather_into_tensor(gathered, value.unsqueeze(0))
    return gathered


def start_all_gather_numbers(value: Tensor) -> Callable[[], Tensor]:
    """Start :func:`all_gather_numbers`, and return a function that waits for its result. Collective.

    ``value`` must not change before that function is called. On a GPU it makes only the stream wait, and not the host.
    """
    if not dist.is_initialized():
        return lambda: value.unsqueeze(0)
    gathered = value.new_empty(world_size(), *value.shape)
    work = dist.all_gather_into_tensor(gathered, value.unsqueeze(0), async_op=True)

    def result() -> Tensor:
        work.wait()
        return gathered

    return result


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all ranks, on their device; ``values`` may be overwritten. Collective."""
    if not dist.is_initialized():
        return values
    on_device = values.cuda(non_blocking=True) if dist.get_backend() == "nccl" else values
    dist.all_reduce(on_device)
    return on_device.to(values.device)


def broadcast(value: Tensor, source: int) -> Tensor:
    """Return the ``value`` of rank ``source``; all must have its shape, dtype and device type. Collective."""
    if not dist.is_initialized():
        return value
    received = value.clone() if rank() == source else torch.empty_like(value)
    dist.broadcast(received, source)
    return received


def raise_on_all_ranks(action: Callable[[], T], kinds: tuple[type[Exception], ...] = (InputError,)) -> T:
    """Run ``action`` on every rank; if one raises an error of these ``kinds``, all do. Collective.

    Unless all ranks fail, the message names the lowest rank that does, and its host.
    """
    result: T | None = None
    problem: Exception | None = None
    try:
        result = action()
    except kinds as error:
        problem = error
    # outside the except clause, and on every rank: those without an error must take part in the exchange
    raise_together(problem)
    return result  # type: ignore[return-value]


def raise_together(problem: Exception | None) -> None:
    """Raise ``problem``, if any rank has one, on all ranks, as :func:`raise_on_all_ranks` does. Collective."""
    if world_size() > 1:
        # the type and the text, since not every error can be pickled
        facts = None if problem is None else (type(problem), str(problem), socket.gethostname())
        facts_by_rank = all_gather_objects(facts)
        failed = [number for number, entry in enumerate(facts_by_rank) if entry is not None]
        # if all ranks fail, each raises its error without the prefix
        if 0 < len(failed) < len(facts_by_rank):
            first = failed[0]
            facts = facts_by_rank[first]
            assert facts is not None
            kind, text, host = facts
            if not issubclass(kind, InputError):
                raise kind(f"rank {first} on {host}: {text}") from problem
            raise InputError(f"rank {first} on {host}: {text}") from problem
    if problem is not None:
        raise problem


def all_ranks() -> Ranks:
    """Return this process and all others as ranks that share the rows of matrices."""
    if world_size() == 1:
        return ALONE

    def send(value: Tensor, source: int) -> Tensor:
        return broadcast(value.contiguous(), source)

    def scatter(values: Tensor) -> Tensor:
        part = values.new_empty(values.shape[1:])
        dist.reduce_scatter(part, list(values))
        return part

    sums = _rank_sums(lambda values: sum_over_ranks(values.clone()), rank(), world_size())
    return Ranks(rank(), world_size(), sums, send, scatter, all_gather_numbers)


def _rank_sums(all_sum: Callable[[Tensor], Tensor], rank: int, number: int) -> RankSums:
    """Return the sums over ``number`` ranks, and over those below ``rank``, by ``all_sum``."""

    def sum_of_lower_ranks(counts: Tensor) -> Tensor:
        # every rank fills its row, so that one sum over ranks is a gather, for any backend
        table = counts.new_zeros((number, *counts.shape))
        table[rank] = counts
        return all_sum(table)[:rank].sum(0)

    return RankSums(all_sum, sum_of_lower_ranks)


def _group_size(param: nn.Parameter, *, owners: bool) -> int:
    """Return the number of ranks of :func:`_group`, also where there is no process group."""
    if owners:
        return sharding.num_shards(param)
    return sharding.num_holders(param)


def _group(param: nn.Parameter, *, owners: bool) -> dist.ProcessGroup | None:
    if owners:
        return sharding.process_group(param)
    return sharding.holders(param)


def _reduce(values: Tensor, param: nn.Parameter, op: dist.ReduceOp.RedOpType, *, owners: bool) -> Tensor:
    if _group_size(param, owners=owners) == 1:
        return values
    group = _group(param, owners=owners)
    from_host = values.device.type == "cpu"  # the device queues such a copy, so the host need not wait
    on_device = values.to(sharding.shard_of(param).values.device, non_blocking=from_host)
    if dist.get_backend(group) == "nccl":
        on_device = on_device.cuda(non_blocking=True)
    dist.all_reduce(on_device, op=op, group=group)
    return on_device.to(values.device)


def group_sum(values: Tensor, param: nn.Parameter, *, owners: bool = False) -> Tensor:
    """Return the sum of ``values`` over the ranks that hold ``param``; unchanged if not partitioned. Collective.

    Of experts on ranks, these are all that hold some, or with ``owners`` those that hold the same.
    """
    return _reduce(values, param, dist.ReduceOp.SUM, owners=owners)


def group_max(values: Tensor, param: nn.Parameter, *, owners: bool = False) -> Tensor:
    """Return the maximum over the ranks of :func:`group_sum`. Collective."""
    return _reduce(values, param, dist.ReduceOp.MAX, owners=owners)


def rank_sums(param: nn.Parameter, *, owners: bool = False) -> RankSums:
    """Return the collectives of selection over the ranks of :func:`group_sum`."""
    number = _group_size(param, owners=owners)
    if number == 1:
        return RankSums()
    rank_in_group = dist.get_rank(_group(param, owners=owners))
    return _rank_sums(lambda counts: group_sum(counts, param, owners=owners), rank_in_group, number)
