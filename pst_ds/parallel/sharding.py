"""Parameters that ZeRO-3 or FSDP2 partitions, and the only access to ZeRO-3's: all their ``ds_*`` attributes.

DeepSpeed partitions a parameter's flat storage into equal shards of ceil(numel / world) elements. The last may be
padded with uninitialised memory, which no function here returns. FSDP2 splits rows, see :mod:`pst_ds.parallel.fsdp2`.
Otherwise every rank holds a single shard.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pst_ds.errors import InputError
from pst_ds.parallel import fsdp2
from pst_ds.third_party import Code, patched, require

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_EXPERTS = "pst_experts"
"""Attribute of a parameter that holds experts of this rank: their :class:`ExpertShare`."""
_DIFFERS = "pst_differs_from_master"
"""Attribute of a parameter whose master has other values on purpose."""
_HOLDER = -1
"""Our entry in DeepSpeed's set of the modules (by number) that use a parameter, equal to none of its modules."""


def in_backward_pass() -> bool:
    """Return whether this thread is inside autograd's backward pass, where a forward pass recomputes a block."""
    return torch._C._current_graph_task_id() != -1  # torch has no public API for it


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of a parameter: flat values from index ``start``, without padding."""

    values: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """This rank's share of the experts of every stack: the one at ``position`` of ``degree`` equal ones."""

    degree: int
    position: int
    name: str
    """Name of the ranks that have the same position, in DeepSpeed's groups."""
    owners: dist.ProcessGroup
    """These ranks."""

    def own_part(self, whole: Tensor) -> Tensor:
        """Return this rank's experts of ``whole``, whose first dimension is in the order of the experts: a view."""
        return whole.chunk(self.degree)[self.position]

    def mark(self, params: Iterable[nn.Parameter]) -> None:
        """Make ZeRO-3 partition ``params``, which hold this rank's experts, over their owners."""
        for param in params:
            setattr(param, _EXPERTS, self)
            param.ds_zero_placement_family = "autoep_expert"
            param.ds_zero_partition_group_name = self.name
            param.ds_zero_partition_process_group = self.owners


@dataclass(frozen=True, slots=True)
class Split:
    """How ``numel`` flat values are divided over ``ranks``: ``share`` for each, fewer or none for the last ones."""

    numel: int
    share: int
    ranks: int
    own: int
    """Index of this rank."""

    def range_of(self, rank: int) -> tuple[int, int]:
        """Return the flat range [first, last) of a rank."""
        return min(rank * self.share, self.numel), min((rank + 1) * self.share, self.numel)


def is_partitioned(param: nn.Parameter) -> bool:
    """Return whether ZeRO-3 or FSDP2 partitions ``param`` over ranks; under FSDP2 not while its module runs."""
    return _by_zero3(param) or fsdp2.is_dtensor(param)


def _by_zero3(param: nn.Parameter) -> bool:
    return hasattr(param, "ds_id")


def refuse_dtensors(params: Iterable[tuple[str, nn.Parameter]], remedy: str) -> None:
    """Raise InputError, with the ``remedy``, if one of these named parameters is a DTensor."""
    for name, param in params:
        if fsdp2.is_dtensor(param):
            raise InputError(f"{name} is a DTensor: FSDP2 (fully_shard) or tensor parallelism has split it. {remedy}")


def mesh_of(tensor: Tensor | None) -> "DeviceMesh | None":
    """Return the mesh over which FSDP2 splits ``tensor``; None if it does not."""
    return fsdp2.mesh(tensor) if tensor is not None and fsdp2.is_dtensor(tensor) else None


def settle(model: nn.Module) -> None:
    """Release what FSDP2 has gathered of ``model``. Raises InputError for parameters split other than by rows."""
    fsdp2.release(model)
    for name, param in model.named_parameters():
        if fsdp2.is_dtensor(param):
            fsdp2.require_rows(name, param)


def expert_share(param: nn.Parameter) -> ExpertShare | None:
    """Return the share of the experts that ``param`` holds; None for parameters that all ranks share."""
    return getattr(param, _EXPERTS, None)


def full_shape(param: nn.Parameter) -> torch.Size:
    """Return the full shape of ``param``, with the experts of all ranks; under ZeRO-3 ``param.shape`` is (0,) while it
    is released."""
    shape, share = _own_shape(param), expert_share(param)
    return shape if share is None else torch.Size((shape[0] * share.degree, *shape[1:]))


def _own_shape(param: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(param, "ds_shape", param.shape))


def full_numel(param: nn.Parameter) -> int:
    return full_shape(param).numel()


def num_shards(param: nn.Parameter) -> int:
    """Return the number of ranks that ``param`` is partitioned over; 1 if it is not."""
    if fsdp2.is_dtensor(param):
        return fsdp2.ranks(param)
    return getattr(param, "ds_zero_partition_world_size", 1) if _by_zero3(param) else 1


def shard_index(param: nn.Parameter) -> int:
    """Return the index of this rank's shard of ``param``; 0 if it is not partitioned."""
    if fsdp2.is_dtensor(param):
        return fsdp2.rank(param)
    return param.ds_zero_partition_rank if _by_zero3(param) else 0


def process_group(param: nn.Parameter) -> dist.ProcessGroup | None:
    """Return the process group that ``param`` is partitioned over; None, the default group, if it is not."""
    return fsdp2.group(param) if fsdp2.is_dtensor(param) else getattr(param, "ds_process_group", None)


def holders(param: nn.Parameter) -> dist.ProcessGroup | None:
    """Return the ranks that hold a part of ``param``, or other experts of its stack; None for the default group."""
    return process_group(param) if expert_share(param) is None else None


def num_holders(param: nn.Parameter) -> int:
    """Return the number of :func:`holders`; 1 if ``param`` is not partitioned."""
    return num_shards(param) * (1 if (share := expert_share(param)) is None else share.degree)


def first_index(param: nn.Parameter) -> int:
    """Return the flat index in the full parameter at which this rank's experts start; 0 without an expert group."""
    return 0 if (share := expert_share(param)) is None else share.position * param.ds_numel


def is_released(param: nn.Parameter) -> bool:
    """Return whether ``param`` is partitioned and not gathered at the moment."""
    return fsdp2.is_dtensor(param) or (_by_zero3(param) and param.ds_status.name != "AVAILABLE")


def split_of(param: nn.Parameter) -> Split:
    """Return how the values of ``param``, or of this rank's experts in it, are divided over ranks."""
    numel, ranks = _own_shape(param).numel(), num_shards(param)
    share = fsdp2.share(param) if fsdp2.is_dtensor(param) else -(-numel // ranks)
    return Split(numel, share, ranks, shard_index(param))


def shard_of(param: nn.Parameter) -> Shard:
    """Return this rank's shard of ``param`` as a writable view; all of it if it is not partitioned."""
    if not is_partitioned(param):
        return Shard(param.detach().view(-1), 0)
    split = split_of(param)
    start, stop = split.range_of(split.own)
    values = fsdp2.local(param).view(-1) if fsdp2.is_dtensor(param) else param.ds_tensor.detach()
    return Shard(values[: stop - start], first_index(param) + start)


def hold(params: Iterable[nn.Parameter]) -> None:
    """Keep the gathered ones of ``params`` gathered until :func:`let_go`, even after their modules have run."""
    for param in params:
        if _by_zero3(param) and not is_released(param):
            param.ds_active_sub_modules.add(_HOLDER)


def let_go(params: Iterable[nn.Parameter]) -> None:
    """End :func:`hold`: ZeRO-3 releases the parameters once their module has run."""
    for param in params:
        if _by_zero3(param):
            param.ds_active_sub_modules.discard(_HOLDER)


def write_shard(param: nn.Parameter, values: Tensor) -> None:
    """Overwrite this rank's shard of a frozen ``param``. Every rank must do so before the next gather."""
    shard_of(param).values.copy_(values)
    shard_changed(param)
    finish_writes(param)


def write_beside_master(param: nn.Parameter, values: Tensor) -> None:
    """Do the same to a ``param`` whose master, if it trains, keeps other values."""
    setattr(param, _DIFFERS, True)
    write_shard(param, values)


def differs_from_master(param: nn.Parameter) -> bool:
    """Return whether :func:`write_beside_master` was called."""
    return hasattr(param, _DIFFERS)


def shard_changed(param: nn.Parameter) -> None:
    """Let the next gather of a frozen ``param`` send what was written to its :func:`shard_of`, once that is finished.

    A gathered parameter (ZeRO-3 keeps small ones gathered) is released, since its full value is outdated.
    """
    if not _by_zero3(param):
        return
    if not is_released(param):
        param.partition()
    param.ds_secondary_tensor = None  # an hpZ copy is made again from the shard


def finish_writes(param: nn.Parameter) -> None:
    """Wait until what was written to shards can be gathered: DeepSpeed gathers on a stream that waits for no other."""
    if _by_zero3(param):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()


def write_whole(param: nn.Parameter, values: Tensor) -> None:
    """Overwrite a frozen ``param`` with ``values``, of its full size, or this rank's shard of it if partitioned."""
    write_shard(param, own_part(param, values.flatten()))


def whole(param: nn.Parameter) -> Tensor:
    """Return all values of ``param``; a copy if it is partitioned. Collective."""
    if fsdp2.is_dtensor(param):
        (values,) = _all_gathered([param], [fsdp2.padded(param)], None)
        return values
    with gathered([param]):
        return param.detach().clone() if is_partitioned(param) else param.detach()


def bytes_split_as(like: nn.Parameter, numel: int, own: Tensor) -> nn.Parameter:
    """Return a frozen parameter of ``numel`` bytes, partitioned like ``like``. Collective under ZeRO-3.

    ``own``: this rank's bytes, all if ``like`` is not partitioned. Needs memory for all bytes while it runs.
    """
    if not _by_zero3(like):
        return nn.Parameter(own, requires_grad=False)
    param = nn.Parameter(torch.zeros(numel, dtype=torch.uint8, device=own.device), requires_grad=False)
    split_as(like, [param])
    write_shard(param, own)
    return param


def own_part(like: nn.Parameter, whole: Tensor) -> Tensor:
    """Return this rank's shard of the flat values ``whole``, (n,), when partitioned like ``like``.

    ``whole`` may also be the values of this rank's experts.
    """
    if (experts := expert_share(like)) is not None and whole.numel() != like.ds_numel:
        whole = experts.own_part(whole)
    share = fsdp2.share(like) if fsdp2.is_dtensor(like) else -(-whole.numel() // num_shards(like))
    return whole[shard_index(like) * share :][:share]


def split_as(like: nn.Parameter, params: Iterable[nn.Parameter]) -> None:
    """Partition ``params``, with the values of rank 0, like ``like``, as ``deepspeed.initialize`` would later.

    Collective under ZeRO-3; does nothing if ``like`` is not partitioned.
    """
    full = [param for param in params if not is_partitioned(param)]
    if full and _by_zero3(like):
        if (share := expert_share(like)) is not None:
            share.mark(full)
        like.convert_to_zero_parameters(param_list=full)


def drop(param: nn.Parameter) -> None:
    """Free the memory of a partitioned parameter that no module uses any more."""
    if _by_zero3(param):
        param.data, param.ds_tensor.data = param.new_empty(0), param.ds_tensor.new_empty(0)
        param.ds_secondary_tensor = None


@contextmanager
def copying_frozen(ranks: int) -> Iterator[None]:
    """Make ZeRO-3 keep a second copy (hpZ) of frozen parameters of the models and engines built in the context.

    It is split over ``ranks`` neighbours, whole for 1, and made of the first gather; 0 is none. Trained parameters have
    no copy: each step would make it anew and wait for the device. Collective. Raises ThirdPartyError.
    """
    if not ranks:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    first = dist.get_rank() // ranks * ranks
    group = dist.new_group(list(range(first, first + ranks)), use_local_synchronization=True)

    def copying(construct: Code) -> Code:
        def constructed(self: Any, *args: object, **options: object) -> None:
            copy = require(self, "_partition_param_sec")

            def copied(param: nn.Parameter, **how: object) -> None:
                # neighbours have other experts, of which only a whole copy of a rank's share makes sense
                if not param.requires_grad and (ranks == 1 or expert_share(param) is None):
                    copy(param, **how)

            self._partition_param_sec = copied
            construct(self, *args, **options | {"zero_param_parallel_group": group})

        return constructed

    def marking(convert: Code) -> Code:
        def marked(self: object, param: nn.Parameter) -> None:
            convert(self, param)
            param.all_gather_coalesced = partial(_gather_or_take, param.all_gather_coalesced)

        return marked

    whole = patched(Init, "_convert_to_deepspeed_param", marking) if ranks == 1 else nullcontext()
    # DeepSpeed makes one group per process, and refuses to make another
    with (
        patched(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", lambda _: group),
        patched(Init, "__init__", copying),
        whole,
    ):
        yield


def _gather_or_take(gather: Code, params: Iterable[nn.Parameter], **options: object) -> object:
    """Return the handle of a gather of ``params``, which use their whole copies where they have them."""
    params = list(params)  # DeepSpeed never mixes those with and without copies
    return _Taken(params) if params and params[0].ds_secondary_tensor is not None else gather(params, **options)


class _Taken:
    """Gather, as seen by DeepSpeed, of parameters with whole copies: nothing is sent or copied."""

    def __init__(self, params: Sequence[nn.Parameter]):
        self._params = params
        for param in params:
            param.data = param.ds_secondary_tensor[: param.ds_numel].view(param.ds_shape)
            param.ds_status = type(param.ds_status).INFLIGHT

    def wait(self, **_: object) -> None:
        for param in self._params:
            param.ds_status = type(param.ds_status).AVAILABLE
        self._params = ()


@contextmanager
def unfilled(chosen: Callable[[nn.Module, str], bool]) -> Iterator[None]:
    """In the context, free the parameters of new modules that ``chosen(module, name)`` selects, once partitioned.

    Each needs :func:`make_shard` before it is gathered. Raises ThirdPartyError.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    def dropping(split: Code) -> Code:
        def without_values(self: object, module: nn.Module) -> None:
            split(self, module)
            for name, param in module.named_parameters(recurse=False):
                if chosen(module, name) and _by_zero3(param) and param.ds_tensor.final_location is None:  # no NVMe
                    drop(param)

        return without_values

    with patched(Init, "_post_init_method", dropping):
        yield


def is_unfilled(param: nn.Parameter) -> bool:
    """Return whether ``param`` was freed by :func:`unfilled` and has no shard yet."""
    return _by_zero3(param) and param.ds_tensor.numel() < param.ds_tensor.ds_numel


def make_shard(param: nn.Parameter) -> None:
    """Give an unfilled ``param`` memory for its shard, with undefined values."""
    param.ds_tensor.data = param.ds_tensor.new_empty(param.ds_tensor.ds_numel)


@contextmanager
def gathered(params: Iterable[nn.Parameter], *, writer_rank: int | None = None) -> Iterator[None]:
    """Gather ``params`` inside the context; does nothing if ZeRO-3 partitions none.

    Collective: every rank must enter. With ``writer_rank`` the values that rank leaves are kept for all.
    """
    partitioned = [p for p in params if _by_zero3(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=writer_rank):
        yield


def master_shard(param: nn.Parameter) -> Shard:
    """Return this rank's shard of the fp32 master of a trained ``param``; the shard of a frozen one.

    If ``param`` is not partitioned, return the full master; collective at ZeRO stages 1 and 2.
    """
    if not param.requires_grad:
        return shard_of(param)
    own = shard_of(param)
    if _has_zero3_master(param):
        return Shard(_zero3_master(param)[: own.values.numel()], own.start)
    if fsdp2.is_dtensor(param):
        return Shard(_split_master(param, kept_masters([param])[0])[: own.values.numel()], own.start)
    return own if is_partitioned(param) else Shard(fp32_masters([param])[0].view(-1), 0)


def fp32_masters(params: Sequence[nn.Parameter], device: torch.device | None = None) -> list[Tensor]:
    """Return the full fp32 masters of trainable ``params`` in their shapes, on ``device`` (None: unchanged).

    A parameter without a master is returned as an fp32 copy; experts on ranks are those of this rank. Collective;
    under ZeRO-3 and FSDP2 a single all-gather and copy, or two if experts are on ranks.
    """
    if params and all(_has_zero3_master(p) for p in params):
        found: dict[nn.Parameter, Tensor] = {}
        for on_ranks in (False, True):
            some = [p for p in params if (expert_share(p) is not None) == on_ranks]
            masters = _all_gathered(some, [_zero3_master(p) for p in some], device) if some else []
            found |= zip(some, masters, strict=True)
        return [found[p] for p in params]
    if params and all(fsdp2.is_dtensor(p) for p in params):
        own = [_split_master(p, kept) for p, kept in zip(params, kept_masters(params), strict=True)]
        return _all_gathered(params, own, device)
    masters = [_master_of(p, kept) for p, kept in zip(params, kept_masters(params), strict=True)]
    return masters if device is None else [master.to(device) for master in masters]


def _has_zero3_master(param: nn.Parameter) -> bool:
    return _by_zero3(param) and param.requires_grad and hasattr(param, "_z3_optimizer")


def _zero3_master(param: nn.Parameter) -> Tensor:
    """Return this rank's shard of the master of ``param``: a flat view with padding, in host memory if offloaded."""
    optimizer = param._z3_optimizer
    group, offset, count = optimizer.grad_position[optimizer.get_param_id(param)]
    return optimizer.fp32_partitioned_groups_flat[group].detach().narrow(0, offset, count)


def _split_master(param: nn.Parameter, kept: Tensor | None) -> Tensor:
    """Return this rank's flat values of the fp32 master of a DTensor ``param``, padded to its share."""
    return fsdp2.padded(param if kept is None else kept).float()


def _all_gathered(params: Sequence[nn.Parameter], own: Sequence[Tensor], device: torch.device | None) -> list[Tensor]:
    """Return values for partitioned ``params``, in their shapes, from this rank's flat, padded ones: one all-gather."""
    world, group = num_shards(params[0]), process_group(params[0])
    order = sorted(range(len(params)), key=lambda i: own[i].numel())  # one copy per size puts shards in a row
    local = [own[i] for i in order]
    flat = torch.cat(local)
    if dist.get_backend(group) == "nccl":
        flat = flat.cuda(non_blocking=True)
    everyone = torch.empty(world * flat.numel(), dtype=flat.dtype, device=flat.device)
    dist.all_gather_into_tensor(everyone, flat, group=group)
    everyone = everyone.to(device or everyone.device)
    sizes = Counter(piece.numel() for piece in local)  # in their order
    parts = everyone.view(world, -1).split([size * count for size, count in sizes.items()], dim=1)
    by_size = zip(parts, sizes.values(), strict=True)
    whole = [row for part, count in by_size for row in part.unflatten(1, (count, -1)).transpose(0, 1).flatten(1)]
    shapes = [_own_shape(param) for param in params]
    found = {i: row[: shapes[i].numel()].view(shapes[i]) for i, row in zip(order, whole, strict=True)}
    return [found[i] for i in range(len(params))]


def kept_masters(params: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the full fp32 masters that MasterAdamW, or DeepSpeed at stage 0, keeps of ``params``.

    None for a parameter without master, or overwritten since, under FSDP2 in this rank's rows. The host waits once for
    the comparison.
    """
    held = {i: param.fp32_master.detach() for i, param in enumerate(params) if hasattr(param, "fp32_master")}
    masters = {i: master for i, master in held.items() if master.shape == params[i].shape}
    pairs = [(fsdp2.local(master), fsdp2.local(params[i])) for i, master in masters.items()]
    same = [(master.to(values) == values).all() for master, values in pairs]
    flags = torch.stack([flag.to(same[0].device) for flag in same]).tolist() if same else []
    holds = {i: flag or differs_from_master(params[i]) for i, flag in zip(masters, flags, strict=True)}
    return [masters[i].to(param.device) if holds.get(i) else None for i, param in enumerate(params)]


def _master_of(param: nn.Parameter, kept: Tensor | None) -> Tensor:
    if kept is not None:
        return kept
    if hasattr(param, "_hp_mapping"):  # ZeRO stages 1 and 2
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(param).detach()
    return whole(param).to(torch.float32, copy=True)
