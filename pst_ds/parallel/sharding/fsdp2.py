"""The only access to FSDP2: parameters that ``fully_shard`` has split, which are DTensors outside a module's passes.

Rank i of n holds rows [i * p, (i + 1) * p) of the first dimension with p = ceil(rows / n); the last ranks may have
fewer or none. While a module runs, forward or backward, its parameters are ordinary ones with all rows.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from pst_ds.errors import InputError
from pst_ds.parallel.sharding.base import Sharding
from pst_ds.parallel.sharding.masters import kept_masters

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class FSDP2(Sharding):
    """DTensors split by rows over one dimension of their mesh. HSDP replicates them over another."""

    splits_rows = True
    reshards_state_dicts = True

    def owns(self, param: Tensor) -> bool:
        return hasattr(param, "placements")  # importing the class DTensor takes two seconds

    def ranks(self, param: nn.Parameter) -> int:
        return _dtensor(param).device_mesh.size(_dimension(param))

    def rank(self, param: nn.Parameter) -> int:
        return _dtensor(param).device_mesh.get_local_rank(_dimension(param))

    def group(self, param: nn.Parameter) -> dist.ProcessGroup:
        return _dtensor(param).device_mesh.get_group(_dimension(param))

    def share(self, param: nn.Parameter, numel: int) -> int:
        """Return the number of values of ``param`` on every rank but the last ones: those of whole rows."""
        rows = param.shape[0]
        values_of_row = param.numel() // max(rows, 1)
        return -(-rows // self.ranks(param)) * values_of_row  # rounded up to whole rows

    def local(self, param: nn.Parameter) -> Tensor:
        return self.rows(param).view(-1)

    @torch.no_grad()
    def rows(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of a DTensor as a writable, detached view."""
        return _dtensor(tensor).to_local().detach()

    def gather(self, param: nn.Parameter) -> Tensor:
        (values,) = self.all_gathered([param], [self._padded(param, param)], None)
        return values

    def release(self, model: nn.Module) -> None:
        """Release what FSDP2 keeps gathered after a pass, so that ``model`` has its DTensors again.

        The root module's parameters are not resharded after the forward pass, nor are any with
        ``reshard_after_forward=False``.
        """
        fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not there, and slow to import, if nothing uses it
        if fsdp is None:
            return
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()

    def require_weights_everywhere(self) -> None:
        """Raise InputError if accelerate loads weights on rank 0 only, and sends them when it splits the model."""
        flags = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
        if all(os.environ.get(flag, "").lower() in ("1", "true") for flag in flags):
            raise InputError(
                "cpu_ram_efficient_loading = true: masks depend on the weights, which only rank 0 has before "
                "accelerate splits the model. Set it to false, in fsdp_config or FullyShardedDataParallelPlugin"
            )

    def require_supported(self, name: str, param: nn.Parameter) -> None:
        """Raise InputError unless ``param`` is split by rows only, over one dimension of its mesh (FSDP2 and HSDP)."""
        # by the names of their classes, whose import takes two seconds
        splits = 0
        is_supported = True
        for placement in _dtensor(param).placements:
            kind = type(placement).__name__
            if kind == "Shard" and getattr(placement, "dim", None) == 0:
                splits += 1
            elif kind != "Replicate":
                is_supported = False
        if splits != 1 or not is_supported:
            raise InputError(
                f"{name} is a DTensor with placements {_dtensor(param).placements}: PST layers support Shard(0) over "
                "one dimension of a mesh and Replicate() over the others, as fully_shard makes them by default. "
                "Remove tensor parallelism (tp_plan, parallelize_module) and shard_placement_fn"
            )

    def require_whole(self, name: str, param: nn.Parameter, remedy: str) -> None:
        raise InputError(f"{name} is a DTensor: FSDP2 (fully_shard) or tensor parallelism has split it. {remedy}")

    def require_alike(self, params: Sequence[tuple[str, nn.Parameter]], others: Sequence[str]) -> None:
        """Raise InputError unless all parameters of pruned layers are split, over one mesh."""
        if params and others:
            raise InputError(
                f"FSDP2 has split {params[0][0]}, and not {others[0]}: masks need all pruned layers over the same "
                "ranks. Call fully_shard on the whole model too, without ignored_params"
            )
        if len({_dtensor(param).device_mesh for _, param in params}) > 1:
            raise InputError("FSDP2 has split pruned layers over several meshes. Give every fully_shard the same mesh")

    def own_master(self, param: nn.Parameter) -> Tensor:
        (kept,) = kept_masters([param])
        return self._padded_master(param, kept)[: self.rows(param).numel()]

    def masters(self, params: Sequence[nn.Parameter], device: torch.device | None) -> list[Tensor]:
        """Return the full fp32 masters. Collective: one all-gather and copy for all of them."""
        values_of_rank: list[Tensor] = []
        for param, kept in zip(params, kept_masters(params), strict=True):
            values_of_rank.append(self._padded_master(param, kept))
        return self.all_gathered(params, values_of_rank, device)

    def _padded_master(self, param: nn.Parameter, kept: Tensor | None) -> Tensor:
        """Return this rank's flat values of the master, or of ``param`` if ``kept`` is None, padded to its share."""
        values = param if kept is None else kept
        return self._padded(param, values).float()

    def _padded(self, param: nn.Parameter, values: Tensor) -> Tensor:
        """Return this rank's part of ``values``, a DTensor split like ``param``, flat and padded to its share."""
        values_of_rank = self.rows(values).flatten()
        padding = self.share(param, param.numel()) - values_of_rank.numel()
        return functional.pad(values_of_rank, (0, padding))


def _dimension(tensor: Tensor) -> int:
    """Return the dimension of the mesh over which the rows are split; HSDP has another that replicates them."""
    for dimension, placement in enumerate(_dtensor(tensor).placements):
        if placement.is_shard():
            return dimension
    raise AssertionError("require_supported rejects a DTensor that is not split")


def _dtensor(tensor: Tensor) -> "DTensor":
    # for the type checker: an isinstance would import the class
    return tensor  # type: ignore[return-value]
