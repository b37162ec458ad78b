"""Count the bytes that torch's collectives bring to this rank, from its node and from other nodes."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from pst_ds.parallel.links import NOTHING, Group, Received
from pst_ds.third_party import Code, patched

_GATHERS = (
    *("allgather", "allgather_coalesced", "all_gather_single", "all_gather_single_coalesced", "broadcast", "reduce"),
    *("_allgather_base", "allgather_into_tensor_coalesced"),  # names of torch before 2.13
)
_SCATTERS = (
    *("reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
)
_SUMS = ("allreduce", "allreduce_coalesced")
_EXCHANGES = ("alltoall", "all_to_all_single", "alltoall_base")
_groups: WeakKeyDictionary[dist.ProcessGroup, Group] = WeakKeyDictionary()
_received = NOTHING
_node_size = 0


@contextmanager
def counting(node_size: int) -> Iterator[None]:
    """Count inside the context, on nodes of ``node_size`` neighbouring ranks. Raises ThirdPartyError."""
    global _node_size
    _node_size = node_size
    _groups.clear()
    with ExitStack() as changes:
        for name in (*_GATHERS, *_SCATTERS, *_SUMS, *_EXCHANGES):
            # each version of torch has some of the names
            if hasattr(dist.ProcessGroup, name):
                changes.enter_context(patched(dist.ProcessGroup, name, partial(_counted, name)))
        yield


def take() -> Received:
    """Return what this rank has received inside :func:`counting` since the last call."""
    global _received
    received = _received
    _received = NOTHING
    return received


def _counted(name: str, collective: Code) -> Code:
    @wraps(collective)
    def counted(group: dist.ProcessGroup, *args: Any, **options: object) -> object:
        global _received
        if group not in _groups:
            ranks = dist.get_process_group_ranks(group)
            _groups[group] = Group(len(ranks), len({rank // _node_size for rank in ranks}))
        # every collective has its output first, and what is scattered is the second argument
        counted_argument = args[1] if name in _SCATTERS else args[0]
        nbytes = _nbytes(counted_argument)
        if name in _EXCHANGES:
            _received += _groups[group].exchanged(nbytes)
        elif name in _SUMS:
            _received += _groups[group].gathered(2 * nbytes)  # a sum scatters and gathers
        else:
            _received += _groups[group].gathered(nbytes)
        return collective(group, *args, **options)

    return counted


def _nbytes(tensors: Tensor | Iterable[Tensor]) -> int:
    """Return the bytes of a tensor, or of all tensors in lists of lists."""
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(map(_nbytes, tensors))
