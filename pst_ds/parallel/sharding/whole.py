"""Parameters that every rank holds in full: without ZeRO-3 and FSDP2, and while a module under FSDP2 runs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pst_ds.parallel.sharding.base import Fragment, Sharding
from pst_ds.parallel.sharding.masters import kept_masters


class Whole(Sharding):
    """Every rank holds all values. Optimizers may keep masters anywhere, and at ZeRO stages 1 and 2 in parts."""

    is_partitioned = False

    def owns(self, param: Tensor) -> bool:
        return True

    def ranks(self, param: nn.Parameter) -> int:
        return 1

    def rank(self, param: nn.Parameter) -> int:
        return 0

    def local(self, param: nn.Parameter) -> Tensor:
        return param.detach().view(-1)

    def gather(self, param: nn.Parameter) -> Tensor:
        return param.detach()

    def own_master(self, param: nn.Parameter) -> Tensor:
        return self.masters([param], None)[0].view(-1)

    def masters(self, params: Sequence[nn.Parameter], device: torch.device | None) -> list[Tensor]:
        masters: list[Tensor] = []
        for param, master in zip(params, kept_masters(params), strict=True):
            if master is None:
                # collective at stages 1 and 2, where no parameter has a kept master, so all ranks come here
                master = _master_of(param)
            if device is not None:
                master = master.to(device)
            masters.append(master)
        return masters

    def fragment(self, name: str, param: nn.Parameter, optimizer: Optimizer) -> Fragment | None:
        if not _is_in_flat_master(param):
            return super().fragment(name, param, optimizer)
        # DeepSpeed says high and low precision for the fp32 master and the parameter
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # no value of the parameter lies in this rank's range
            return None
        in_owner = mapping.hp_fragment_address
        in_param = mapping.lp_fragment_address
        return Fragment(
            name=name,
            start=in_param.start,
            stop=in_param.start + in_param.numel,
            owner=optimizer.param_groups[mapping.param_group_index]["params"][0],
            offset=in_owner.start,
        )

    def replicates_optimizer(self, param: nn.Parameter) -> bool:
        return not _is_in_flat_master(param)

    def cuts_optimizer_evenly(self, param: nn.Parameter) -> bool:
        return not _is_in_flat_master(param)


def _is_in_flat_master(param: nn.Parameter) -> bool:
    """Return whether DeepSpeed keeps the master of ``param`` in a flat tensor of its parameter group.

    ZeRO-1 and 2, and DeepSpeed's bf16 optimizer, cut that tensor at arbitrary places into ranges of the ranks.
    """
    return hasattr(param, "_hp_mapping")


def _master_of(param: nn.Parameter) -> Tensor:
    """Return the master that DeepSpeed keeps of ``param`` at stages 1 and 2, or an fp32 copy. Collective there."""
    if _is_in_flat_master(param):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(param).detach()
    return param.detach().to(torch.float32, copy=True)
