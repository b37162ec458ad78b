"""Count the bytes that torch's collectives bring to this rank, from its node and from other nodes."""

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from pst_ds.parallel.links import NOTHING, Group, Received
from pst_ds.third_party import Code, patch

_MARK = "pst_counts"
_GATHERS = (
    *("allgather", "allgather_coalesced", "all_gather_single", "all_gather_single_coalesced", "broadcast", "reduce"),
    *("_allgather_base", "allgather_into_tensor_coalesced"),  # names of torch before 2.13
)
_SCATTERS = (
    *("reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("_reduce_scatter_base", "reduce_scatter_tensor_coalesced"),
)
_SUMS, _EXCHANGES = ("allreduce", "allreduce_coalesced"), ("alltoall", "all_to_all_single", "alltoall_base")
_groups: WeakKeyDictionary[dist.ProcessGroup, Group] = WeakKeyDictionary()
_received = NOTHING
_node_size = 0


def start(node_size: int) -> None:
    """Count from now on, on nodes of ``node_size`` neighbouring ranks. Raises ThirdPartyError."""
    global _node_size
    _node_size = node_size
    _groups.clear()
    for name in (*_GATHERS, *_SCATTERS, *_SUMS, *_EXCHANGES):
        collective = getattr(dist.ProcessGroup, name, None)
        if collective is not None and not hasattr(collective, _MARK):
            patch(dist.ProcessGroup, name, partial(_counted, name))


def take() -> Received:
    """Return what this rank has received since the last call."""
    global _received
    found, _received = _received, NOTHING
    return found


def _counted(name: str, collective: Code) -> Code:
    @wraps(collective)
    def counted(group: dist.ProcessGroup, *args: Any, **options: object) -> object:
        global _received
        if group not in _groups:
            ranks = dist.get_process_group_ranks(group)
            _groups[group] = Group(len(ranks), len({rank // _node_size for rank in ranks}))
        nbytes = _nbytes(args[name in _SCATTERS])  # the output, or what is scattered
        bring = _groups[group].exchanged if name in _EXCHANGES else _groups[group].gathered
        _received += bring(2 * nbytes if name in _SUMS else nbytes)
        return collective(group, *args, **options)

    setattr(counted, _MARK, True)
    return counted


def _nbytes(tensors: Tensor | Iterable[Tensor]) -> int:
    """Return the bytes of a tensor, or of all tensors in lists of lists."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_nbytes, tensors))
