"""This rank's part of each global batch, made ahead in a thread."""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self, TypeVar

from pst_ds.data.tasks import ExampleSet
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.parallel.watchdog import heartbeat
from pst_ds.train.divergence import MicroBatch
from pst_ds.train.run_context import RunContext

T = TypeVar("T")
AHEAD = 2
"""Batches kept ready."""


@dataclass(frozen=True, slots=True)
class OwnBatch:
    """A rank's part of a global batch."""

    micro_batches: list[MicroBatch]
    tokens: int
    """Tokens of the whole batch."""


def own_batches(context: RunContext, examples: ExampleSet, first: int) -> Iterator[OwnBatch]:
    """Yield this rank's part of each global batch, starting with number ``first``, without end. Not collective.

    Tensors are on the CPU, pinned if a GPU copies them. A micro-batch has a share, 1 on average over all ranks, which
    weights its mean loss so that the mean over all ranks is the global batch's loss, regardless of how it is split.
    Ranks that share sequences get the same part.
    """
    run = context.run
    task = context.task
    # ranks that share sequences are neighbours, and count as one that trains
    group = rank() // run.train.sequence_parallel
    num_groups = world_size() // run.train.sequence_parallel
    uses_gpu = context.device.startswith("cuda")
    batches = task.batches(examples, run.train.batch_size, run.seed, group_by_length=run.data.group_by_length)
    for batch in batches.after(first):
        parts = batches.micro_batches(batch, group, num_groups, run.train.gradient_accumulation_steps)
        # The engine averages over micro-batches and ranks. Times their number, a share is the micro-batch's part of all
        # targets. A batch without targets has loss 0, with any divisor.
        share_per_target = len(parts) * num_groups / max(1, task.num_targets(examples, batch))
        micro_batches = []
        for indices in parts:
            inputs = task.collate(examples, indices, context.tokenizer)
            if uses_gpu:
                inputs = {name: values.pin_memory() for name, values in inputs.items()}
            share = share_per_target * task.num_targets(examples, indices)
            micro_batches.append(MicroBatch(inputs, share, indices))
        tokens = int(sum(examples.lengths[i] for i in batch))
        yield OwnBatch(micro_batches, tokens)


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
        # the watchdog prints the stack of this thread if a batch does not come
        self._thread = self._pool.submit(threading.current_thread).result()
        for _ in range(AHEAD):
            self._ready.append(self._pool.submit(self._items.__next__))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __next__(self) -> T:
        heartbeat("reading a batch", self._thread)
        self._ready.append(self._pool.submit(self._items.__next__))
        return self._ready.popleft().result()
