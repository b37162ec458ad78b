"""This rank's part of each global batch, made ahead in a thread; agreement of the ranks on batches of streams."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self, TypeVar

from pst_ds.data.tasks import ExampleSet
from pst_ds.errors import InputError
from pst_ds.parallel.ranks import all_gather_objects, raise_together, rank, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.train.divergence import MicroBatch
from pst_ds.train.run_context import RunContext

T = TypeVar("T")
AHEAD = 2
"""Batches kept ready."""
Places = list[list[int]]
"""Position of a reader in each of the run's streams, as JSON values."""


@dataclass(frozen=True, slots=True)
class OwnBatch:
    """A rank's part of a global batch."""

    micro_batches: list[MicroBatch]
    tokens: int
    """Tokens of the whole batch."""
    targets: int
    """Predicted tokens of this part."""
    places: Places | None
    """Position of this rank's reader after the batch; None without streams."""


def own_batches(
    context: RunContext, examples: ExampleSet, first: int, streams: Sequence[Places] = ()
) -> Iterator[OwnBatch]:
    """Yield this rank's part of each global batch, starting with number ``first``, without end. Not collective.

    Tensors are on the CPU, pinned if a GPU copies them. A micro-batch has a share, 1 on average over all ranks, which
    weights its mean loss so that the mean over all ranks is the global batch's loss, regardless of how it is split.
    Ranks that share sequences get the same part. With streams, each reader resumes at its place in ``streams``, and
    shares are counts of targets until :func:`agreed` has gathered the counts of all ranks.
    """
    run, task, lengths = context.run, context.task, examples.lengths
    degree, accumulation = run.train.sequence_parallel, run.train.gradient_accumulation_steps
    group, groups = rank() // degree, world_size() // degree
    reader = task.reader(examples, run.seed, group, groups, streams[group] if streams else ())
    batches = task.batches(examples, run.train.batch_size, run.seed, group_by_length=run.data.group_by_length)
    for batch in batches.after(first):
        own = batches.micro_batches(batch, group, groups, accumulation)
        tokens = int(sum(lengths[i] for i in batch))
        if reader is None:
            parts = [(examples, indices) for indices in own]
            per_target = len(own) * groups / max(1, task.num_targets(examples, batch))
        else:
            drawn = [reader.take(indices) for indices in own]
            parts = [(of, range(len(of))) for of in drawn]
            per_target = 1.0
        collated = [task.collate(of, indices, context.tokenizer) for of, indices in parts]
        if context.device.startswith("cuda"):
            collated = [{name: values.pin_memory() for name, values in inputs.items()} for inputs in collated]
        targets = [task.num_targets(of, indices) for of, indices in parts]
        micro_batches = list(map(MicroBatch, collated, [per_target * count for count in targets], own))
        yield OwnBatch(micro_batches, tokens, sum(targets), reader.places if reader else None)


def next_or_problem(batches: Iterator[OwnBatch]) -> OwnBatch | InputError:
    """Return the next batch, or the error that prevents it on this rank."""
    try:
        return next(batches)
    except InputError as problem:
        return problem


def agreed(taken: OwnBatch | InputError, degree: int) -> tuple[OwnBatch, list[Places]]:
    """Return (this rank's part of a batch of streams with final shares, positions of all readers after it).

    ``degree`` ranks share a reader. Collective. Raises InputError on all ranks if one of them could not read.
    """
    batch, problem = (None, taken) if isinstance(taken, InputError) else (taken, None)
    raise_together(problem)
    assert batch is not None
    of_ranks = all_gather_objects((batch.targets, batch.places or []))[::degree]
    total = sum(targets for targets, _ in of_ranks)
    per_target = len(batch.micro_batches) * len(of_ranks) / max(1, total)
    shared = [replace(one, share=per_target * one.share) for one in batch.micro_batches]
    return replace(batch, micro_batches=shared), [places for _, places in of_ranks]


class Prefetched(Iterator[T]):
    """Iterator over ``items``, computed by a thread at most :data:`AHEAD` items ahead. A context manager.

    An exception is raised where its item is requested. ``items`` must not draw from the process-wide random generators:
    when the thread would do so is undefined.
    """

    def __init__(self, items: Iterator[T]):
        self._items = items
        self._pool = ThreadPoolExecutor(1, "prefetch")
        self._ready: deque[Future[T]] = deque()

    def __enter__(self) -> Self:
        self._thread = self._pool.submit(threading.current_thread).result()
        self._ready.extend(self._pool.submit(self._items.__next__) for _ in range(AHEAD))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __next__(self) -> T:
        heartbeat("reading a batch", self._thread)
        self._ready.append(self._pool.submit(self._items.__next__))
        return self._ready.popleft().result()
