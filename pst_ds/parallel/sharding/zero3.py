"""Parameters that ZeRO-3 partitions, and the only access to their ``ds_*`` attributes.

DeepSpeed partitions a parameter's flat storage into equal shards of ceil(numel / world) elements. The last may be
padded with uninitialised memory, which no function here returns.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pst_ds.parallel.sharding.base import Fragment, Sharding
from pst_ds.third_party import Code, patched, require

_EXPERTS = "pst_experts"
"""Attribute of a parameter that holds experts of this rank: their :class:`ExpertShare`."""
_HOLDER = -1
"""Our entry in DeepSpeed's set of the modules (by number) that use a parameter, equal to none of its modules."""


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


def expert_share(param: Tensor) -> ExpertShare | None:
    """Return the share of the experts that ``param`` holds; None for parameters that all ranks share."""
    return getattr(param, _EXPERTS, None)


class ZeRO3(Sharding):
    """Parameters that ``zero.Init`` or ``deepspeed.initialize`` has converted, gathered at the moment or not."""

    divides_experts = True

    def owns(self, param: Tensor) -> bool:
        return hasattr(param, "ds_id")

    def ranks(self, param: nn.Parameter) -> int:
        return getattr(param, "ds_zero_partition_world_size", 1)

    def rank(self, param: nn.Parameter) -> int:
        return param.ds_zero_partition_rank

    def group(self, param: nn.Parameter) -> dist.ProcessGroup | None:
        return param.ds_process_group

    def shape(self, param: nn.Parameter) -> torch.Size:
        return torch.Size(param.ds_shape)  # param.shape is (0,) while it is released

    def first_index(self, param: nn.Parameter) -> int:
        share = expert_share(param)
        if share is None:
            return 0
        return share.position * param.ds_numel  # all positions have the same number of experts

    def local(self, param: nn.Parameter) -> Tensor:
        split = self.split(param)
        start, stop = split.range_of(split.own)
        return param.ds_tensor.detach()[: stop - start]

    def own_part(self, like: nn.Parameter, whole: Tensor) -> Tensor:
        share = expert_share(like)
        if share is not None and whole.numel() != like.ds_numel:  # of the experts of all ranks
            whole = share.own_part(whole)
        return super().own_part(like, whole)

    def gather(self, param: nn.Parameter) -> Tensor:
        with self.gathered([param], None):
            return param.detach().clone()  # DeepSpeed frees the gathered values

    def changed(self, param: nn.Parameter) -> None:
        # ZeRO-3 keeps small parameters gathered, whose full value is outdated now.
        if not self.is_released(param):
            param.partition()
        param.ds_secondary_tensor = None  # an hpZ copy is made again from the shard

    def finish_writes(self) -> None:
        """Wait for the device: DeepSpeed gathers on a stream that waits for no other."""
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()

    def is_released(self, param: nn.Parameter) -> bool:
        return param.ds_status.name != "AVAILABLE"

    @contextmanager
    def gathered(self, params: Sequence[nn.Parameter], writer_rank: int | None) -> Iterator[None]:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(params), modifier_rank=writer_rank):
            yield

    def hold(self, param: nn.Parameter) -> None:
        if not self.is_released(param):
            param.ds_active_sub_modules.add(_HOLDER)

    def let_go(self, param: nn.Parameter) -> None:
        param.ds_active_sub_modules.discard(_HOLDER)

    def split_as(self, like: nn.Parameter, params: Sequence[nn.Parameter]) -> None:
        """Partition ``params`` as ``deepspeed.initialize`` would later. Collective."""
        share = expert_share(like)
        if share is not None:
            share.mark(params)
        like.convert_to_zero_parameters(param_list=list(params))

    def bytes_split_as(self, like: nn.Parameter, numel: int, own: Tensor) -> nn.Parameter:
        # DeepSpeed partitions only values that are there: zeros, which the shards then replace.
        param = nn.Parameter(torch.zeros(numel, dtype=torch.uint8, device=own.device), requires_grad=False)
        self.split_as(like, [param])
        self.write(param, own)
        return param

    def drop(self, param: nn.Parameter) -> None:
        param.data = param.new_empty(0)
        param.ds_tensor.data = param.ds_tensor.new_empty(0)
        param.ds_secondary_tensor = None

    def is_unfilled(self, param: nn.Parameter) -> bool:
        return param.ds_tensor.numel() < param.ds_tensor.ds_numel

    def own_master(self, param: nn.Parameter) -> Tensor:
        values = self.local(param)
        if not _has_master(param):
            return values
        return _master(param)[: values.numel()]  # without the padding

    def masters(self, params: Sequence[nn.Parameter], device: torch.device | None) -> list[Tensor]:
        """Return the full fp32 masters. Collective: one all-gather and copy, or two if experts are on ranks."""
        if not all(_has_master(param) for param in params):  # before deepspeed.initialize
            copies: list[Tensor] = []
            for param in params:
                values = self.gather(param).to(torch.float32, copy=True)
                copies.append(values.to(device or values.device))
            return copies
        # Experts of a rank are partitioned over other ranks than the parameters that all share.
        shared: list[nn.Parameter] = []
        of_experts: list[nn.Parameter] = []
        for param in params:
            if expert_share(param) is None:
                shared.append(param)
            else:
                of_experts.append(param)
        masters: dict[nn.Parameter, Tensor] = {}
        # in this order on every rank: each is a collective over other ranks
        for alike in (shared, of_experts):
            if alike:
                full_values = self.all_gathered(alike, [_master(param) for param in alike], device)
                masters.update(zip(alike, full_values, strict=True))
        return [masters[param] for param in params]

    def fragment(self, name: str, param: nn.Parameter, optimizer: Optimizer) -> Fragment:
        flat = _place_of_master(param)
        split = self.split(param)
        start, stop = split.range_of(split.own)
        first = self.first_index(param)
        return Fragment(name=name, start=first + start, stop=first + stop, owner=flat.owner, offset=flat.offset)


@dataclass(frozen=True, slots=True)
class _PlaceOfMaster:
    """Where ZeRO-3 keeps this rank's shard of a master: ``count`` values with padding, from ``offset`` of ``owner``."""

    owner: Tensor
    offset: int
    count: int


def _has_master(param: nn.Parameter) -> bool:
    return param.requires_grad and hasattr(param, "_z3_optimizer")


def _master(param: nn.Parameter) -> Tensor:
    """Return this rank's shard of the master of ``param``: a flat view with padding, in host memory if offloaded."""
    place = _place_of_master(param)
    return place.owner.detach().narrow(0, place.offset, place.count)


def _place_of_master(param: nn.Parameter) -> _PlaceOfMaster:
    optimizer = param._z3_optimizer
    group, offset, count = optimizer.grad_position[optimizer.get_param_id(param)]
    return _PlaceOfMaster(owner=optimizer.fp32_partitioned_groups_flat[group], offset=offset, count=count)


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

    # a rank that has whole copies needs no gather, so DeepSpeed's is replaced by one that takes the copies
    taking_copies = patched(Init, "_convert_to_deepspeed_param", marking) if ranks == 1 else nullcontext()
    # DeepSpeed makes one group per process, and refuses to make another
    with (
        patched(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", lambda _: group),
        patched(Init, "__init__", copying),
        taking_copies,
    ):
        yield


def _gather_or_take(gather: Code, params: Iterable[nn.Parameter], **options: object) -> object:
    """Return the handle of a gather of ``params``, which use their whole copies where they have them."""
    params = list(params)  # DeepSpeed never mixes those with and without copies
    if params and params[0].ds_secondary_tensor is not None:
        return _Taken(params)
    return gather(params, **options)


class _Taken:
    """Gather, as seen by DeepSpeed, of parameters with whole copies: nothing is sent or copied."""

    def __init__(self, params: Sequence[nn.Parameter]):
        self._params = params
        for param in params:
            param.data = param.ds_secondary_tensor[: param.ds_numel].view(param.ds_shape)
            # DeepSpeed expects a gather in progress between the start and wait()
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

    zero3 = ZeRO3()

    def dropping(split: Code) -> Code:
        def without_values(self: object, module: nn.Module) -> None:
            split(self, module)
            for name, param in module.named_parameters(recurse=False):
                if not (chosen(module, name) and zero3.owns(param)):
                    continue
                if param.ds_tensor.final_location is None:  # not on NVMe
                    zero3.drop(param)

        return without_values

    with patched(Init, "_post_init_method", dropping):
        yield


def make_shard(param: nn.Parameter) -> None:
    """Give an unfilled ``param`` memory for its shard, with undefined values."""
    param.ds_tensor.data = param.ds_tensor.new_empty(param.ds_tensor.ds_numel)
