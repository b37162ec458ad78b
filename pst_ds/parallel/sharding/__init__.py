"""Parameters that are divided over ranks: what the rest of the package asks and does, however they are divided.

Each function asks :func:`sharding_of` for the :class:`Sharding` of its parameter and leaves the work to it. ZeRO-3 and
FSDP2 have a file each, and other packages can add shardings, see :class:`Sharding`. Without one of them every rank
holds a single shard, the whole parameter.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pst_ds.parallel.sharding.base import Fragment, Shard, Sharding, Split
from pst_ds.parallel.sharding.in_flat import PlaceInFlat, put_into_flat
from pst_ds.parallel.sharding.masters import differs_from_master, kept_masters, let_differ
from pst_ds.parallel.sharding.registry import SHARDINGS, sharding_of, shardings
from pst_ds.parallel.sharding.whole import Whole  # now, since a later import would hide the function of that name
from pst_ds.parallel.sharding.zero3 import ExpertShare, copying_frozen, expert_share, make_shard, unfilled

__all__ = [
    "SHARDINGS",
    "ExpertShare",
    "Fragment",
    "PlaceInFlat",
    "Shard",
    "Sharding",
    "Split",
    "Whole",
    "bytes_split_as",
    "copying_frozen",
    "cuts_optimizer_evenly",
    "differs_from_master",
    "divides_experts",
    "drop",
    "expert_share",
    "finish_writes",
    "first_index",
    "fp32_masters",
    "fragment_of",
    "full_numel",
    "full_shape",
    "gathered",
    "hold",
    "holders",
    "in_backward_pass",
    "is_partitioned",
    "is_released",
    "is_unfilled",
    "kept_masters",
    "let_go",
    "make_shard",
    "master_shard",
    "num_holders",
    "num_shards",
    "own_part",
    "process_group",
    "put_into_flat",
    "refuse_dtensors",
    "release",
    "replicates_optimizer",
    "require_alike",
    "require_supported",
    "require_weights_everywhere",
    "reshards_state_dicts",
    "shard_changed",
    "shard_index",
    "shard_of",
    "sharding_of",
    "shardings",
    "split_as",
    "split_of",
    "splits_rows",
    "unfilled",
    "whole",
    "write_beside_master",
    "write_shard",
    "write_whole",
]


def in_backward_pass() -> bool:
    """Return whether this thread is inside autograd's backward pass, where a forward pass recomputes a block."""
    return torch._C._current_graph_task_id() != -1  # torch has no public API for it


# What is refused, and released


def refuse_dtensors(params: Iterable[tuple[str, nn.Parameter]], remedy: str) -> None:
    """Raise InputError, with the ``remedy``, if one of these named parameters is a DTensor."""
    for name, param in params:
        sharding_of(param).require_whole(name, param, remedy)


def require_weights_everywhere() -> None:
    """Raise InputError if weights are on one rank only until they are divided: masks depend on them."""
    for sharding in shardings():
        sharding.require_weights_everywhere()


def require_supported(params: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise InputError for named parameters that are divided in a way that pruned layers do not support."""
    for name, param in params:
        sharding_of(param).require_supported(name, param)


def require_alike(params: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise InputError for named parameters of pruned layers that are divided so that they cannot share masks."""
    named = list(params)
    for sharding in shardings():
        alike: list[tuple[str, nn.Parameter]] = []
        others: list[str] = []
        for name, param in named:
            if sharding_of(param) is sharding:
                alike.append((name, param))
            else:
                others.append(name)
        sharding.require_alike(alike, others)


def release(model: nn.Module) -> None:
    """Release parameters of ``model`` that stayed gathered after a pass, as FSDP2 leaves them. Not collective."""
    for sharding in shardings():
        sharding.release(model)


# Where the values of a parameter are


def is_partitioned(param: nn.Parameter) -> bool:
    """Return whether ``param`` is divided over ranks; under FSDP2 it is not while its module runs."""
    return sharding_of(param).is_partitioned


def is_released(param: nn.Parameter) -> bool:
    """Return whether ``param`` is partitioned and not gathered at the moment."""
    return sharding_of(param).is_released(param)


def splits_rows(param: nn.Parameter) -> bool:
    """Return whether ranks hold whole rows of ``param``, as under FSDP2."""
    return sharding_of(param).splits_rows


def divides_experts(param: nn.Parameter) -> bool:
    """Return whether ranks can hold different experts of ``param``, as under ZeRO-3."""
    return sharding_of(param).divides_experts


def reshards_state_dicts(tensor: Tensor) -> bool:
    """Return whether any number of ranks can load ``tensor`` from a module's state dict, as with FSDP2."""
    return sharding_of(tensor).reshards_state_dicts


def full_shape(param: nn.Parameter) -> torch.Size:
    """Return the full shape of ``param``, with the experts of all ranks; under ZeRO-3 ``param.shape`` is (0,) while it
    is released."""
    shape = sharding_of(param).shape(param)
    share = expert_share(param)
    if share is None:
        return shape
    return torch.Size((shape[0] * share.degree, *shape[1:]))  # experts are the first dimension


def full_numel(param: nn.Parameter) -> int:
    return full_shape(param).numel()


def num_shards(param: nn.Parameter) -> int:
    """Return the number of ranks that ``param`` is partitioned over; 1 if it is not."""
    return sharding_of(param).ranks(param)


def shard_index(param: nn.Parameter) -> int:
    """Return the index of this rank's shard of ``param``; 0 if it is not partitioned."""
    return sharding_of(param).rank(param)


def process_group(param: nn.Parameter) -> dist.ProcessGroup | None:
    """Return the process group that ``param`` is partitioned over; None, the default group, if it is not."""
    return sharding_of(param).group(param)


def holders(param: nn.Parameter) -> dist.ProcessGroup | None:
    """Return the ranks that hold a part of ``param``, or other experts of its stack; None for the default group."""
    if expert_share(param) is None:
        return process_group(param)
    return None  # the owners of all positions together are all ranks


def num_holders(param: nn.Parameter) -> int:
    """Return the number of :func:`holders`; 1 if ``param`` is not partitioned."""
    share = expert_share(param)
    if share is None:
        return num_shards(param)
    return num_shards(param) * share.degree


def first_index(param: nn.Parameter) -> int:
    """Return the flat index in the full parameter at which this rank's experts start; 0 without an expert group."""
    return sharding_of(param).first_index(param)


def split_of(param: nn.Parameter) -> Split:
    """Return how the values of ``param``, or of this rank's experts in it, are divided over ranks."""
    return sharding_of(param).split(param)


def shard_of(param: nn.Parameter) -> Shard:
    """Return this rank's shard of ``param`` as a writable view; all of it if it is not partitioned."""
    sharding = sharding_of(param)
    if not sharding.is_partitioned:
        return Shard(sharding.local(param), 0)
    split = sharding.split(param)
    start, _ = split.range_of(split.own)
    return Shard(sharding.local(param), sharding.first_index(param) + start)


def own_part(like: nn.Parameter, whole: Tensor) -> Tensor:
    """Return this rank's shard of the flat values ``whole``, (n,), when partitioned like ``like``.

    ``whole`` may also be the values of this rank's experts.
    """
    return sharding_of(like).own_part(like, whole)


# Writing


def write_shard(param: nn.Parameter, values: Tensor) -> None:
    """Overwrite this rank's shard of a frozen ``param``. Every rank must do so before the next gather."""
    sharding_of(param).write(param, values)


def write_beside_master(param: nn.Parameter, values: Tensor) -> None:
    """Do the same to a ``param`` whose master, if it trains, keeps other values."""
    let_differ(param)
    write_shard(param, values)


def write_whole(param: nn.Parameter, values: Tensor) -> None:
    """Overwrite a frozen ``param`` with ``values``, of its full size, or this rank's shard of it if partitioned."""
    write_shard(param, own_part(param, values.flatten()))


def shard_changed(param: nn.Parameter) -> None:
    """Let the next gather of a frozen ``param`` send what was written to its :func:`shard_of`, once that is finished.

    A gathered parameter (ZeRO-3 keeps small ones gathered) is released, since its full value is outdated.
    """
    sharding_of(param).changed(param)


def finish_writes(param: nn.Parameter) -> None:
    """Wait until what was written to shards, of ``param`` and others divided like it, can be gathered."""
    sharding_of(param).finish_writes()


# Gathering


def whole(param: nn.Parameter) -> Tensor:
    """Return all values of ``param``; a copy if it is partitioned. Collective."""
    return sharding_of(param).gather(param)


@contextmanager
def gathered(params: Iterable[nn.Parameter], *, writer_rank: int | None = None) -> Iterator[None]:
    """Gather ``params`` inside the context; does nothing if ZeRO-3 partitions none.

    Collective: every rank must enter. With ``writer_rank`` the values that rank leaves are kept for all.
    """
    with ExitStack() as contexts:
        for sharding, alike in _by_sharding(params).items():
            contexts.enter_context(sharding.gathered(alike, writer_rank))
        yield


def _by_sharding(params: Iterable[nn.Parameter]) -> dict[Sharding, list[nn.Parameter]]:
    """Return ``params`` by their sharding, in the order in which they come, which is the same on every rank."""
    alike: dict[Sharding, list[nn.Parameter]] = {}
    for param in params:
        alike.setdefault(sharding_of(param), []).append(param)
    return alike


def hold(params: Iterable[nn.Parameter]) -> None:
    """Keep the gathered ones of ``params`` gathered until :func:`let_go`, even after their modules have run."""
    for param in params:
        sharding_of(param).hold(param)


def let_go(params: Iterable[nn.Parameter]) -> None:
    """End :func:`hold`: ZeRO-3 releases the parameters once their module has run."""
    for param in params:
        sharding_of(param).let_go(param)


# New parameters, and those without memory


def split_as(like: nn.Parameter, params: Iterable[nn.Parameter]) -> None:
    """Partition ``params``, with the values of rank 0, like ``like``, as ``deepspeed.initialize`` would later.

    Collective under ZeRO-3; does nothing if ``like`` is not partitioned.
    """
    undivided = [param for param in params if not is_partitioned(param)]
    if undivided:
        sharding_of(like).split_as(like, undivided)


def bytes_split_as(like: nn.Parameter, numel: int, own: Tensor) -> nn.Parameter:
    """Return a frozen parameter of ``numel`` bytes, partitioned like ``like``. Collective under ZeRO-3.

    ``own``: this rank's bytes, all if ``like`` is not partitioned. Needs memory for all bytes while it runs.
    """
    return sharding_of(like).bytes_split_as(like, numel, own)


def drop(param: nn.Parameter) -> None:
    """Free the memory of a partitioned parameter that no module uses any more."""
    sharding_of(param).drop(param)


def is_unfilled(param: nn.Parameter) -> bool:
    """Return whether ``param`` was freed by :func:`unfilled` and has no shard yet."""
    return sharding_of(param).is_unfilled(param)


# fp32 masters


def master_shard(param: nn.Parameter) -> Shard:
    """Return this rank's shard of the fp32 master of a trained ``param``; the shard of a frozen one.

    If ``param`` is not partitioned, return the full master; collective at ZeRO stages 1 and 2.
    """
    shard = shard_of(param)
    if not param.requires_grad:
        return shard
    return Shard(sharding_of(param).own_master(param), shard.start)


def fp32_masters(params: Sequence[nn.Parameter], device: torch.device | None = None) -> list[Tensor]:
    """Return the full fp32 masters of trainable ``params`` in their shapes, on ``device`` (None: unchanged).

    A parameter without a master is returned as an fp32 copy; experts on ranks are those of this rank. Collective;
    under ZeRO-3 and FSDP2 a single all-gather and copy, or two if experts are on ranks.
    """
    masters: dict[nn.Parameter, Tensor] = {}
    for sharding, alike in _by_sharding(params).items():
        masters.update(zip(alike, sharding.masters(alike, device), strict=True))
    return [masters[param] for param in params]


def fragment_of(name: str, param: nn.Parameter, optimizer: Optimizer) -> Fragment | None:
    """Return where torch's ``optimizer`` holds this rank's values of a trained ``param``; None if it holds no value."""
    return sharding_of(param).fragment(name, param, optimizer)


def replicates_optimizer(param: nn.Parameter) -> bool:
    """Return whether every rank holds the full optimizer state of ``param``."""
    return sharding_of(param).replicates_optimizer(param)


def cuts_optimizer_evenly(param: nn.Parameter) -> bool:
    """Return whether rank r holds the optimizer state of equal share r of ``param``, as under ZeRO-3, or all of it."""
    return sharding_of(param).cuts_optimizer_evenly(param)
