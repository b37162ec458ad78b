"""The only access to FSDP2: parameters that ``fully_shard`` has split, which are DTensors outside a module's passes.

Rank i of n holds rows [i * p, (i + 1) * p) of the first dimension with p = ceil(rows / n); the last ranks may have
fewer or none. While a module runs, forward or backward, its parameters are ordinary ones with all rows.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from pst_ds.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")  # importing the class DTensor takes two seconds


def require_rows(name: str, tensor: Tensor) -> None:
    """Raise InputError unless a DTensor is split by rows only, over one dimension of its mesh (FSDP2 and HSDP)."""
    by_rows = ("Shard", 0)
    kinds = [(type(place).__name__, getattr(place, "dim", None)) for place in _dtensor(tensor).placements]
    if kinds.count(by_rows) != 1 or any(kind not in (by_rows, ("Replicate", None)) for kind in kinds):
        raise InputError(
            f"{name} is a DTensor with placements {_dtensor(tensor).placements}: PST layers support Shard(0) over one "
            "dimension of a mesh and Replicate() over the others, as fully_shard makes them by default. Remove tensor "
            "parallelism (tp_plan, parallelize_module) and shard_placement_fn"
        )


def require_weights_everywhere() -> None:
    """Raise InputError if accelerate loads weights on rank 0 only, and sends them when it splits the model."""
    flags = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    if all(os.environ.get(flag, "").lower() in ("1", "true") for flag in flags):
        raise InputError(
            "cpu_ram_efficient_loading = true: masks depend on the weights, which only rank 0 has before accelerate "
            "splits the model. Set it to false, in fsdp_config or FullyShardedDataParallelPlugin"
        )


def release(model: nn.Module) -> None:
    """Release the parameters that FSDP2 keeps gathered after a pass, so that ``model`` has its DTensors again."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not there, and slow to import, if nothing uses it
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a DTensor as a writable view; any other tensor unchanged. Both detached."""
    return _dtensor(tensor).to_local().detach() if is_dtensor(tensor) else tensor.detach()


def padded(tensor: Tensor) -> Tensor:
    """Return this rank's values of a DTensor, flat, followed by zeros up to its :func:`share`."""
    values = local(tensor).flatten()
    return functional.pad(values, (0, share(tensor) - values.numel()))


def mesh(tensor: Tensor) -> "DeviceMesh":
    return _dtensor(tensor).device_mesh


def ranks(tensor: Tensor) -> int:
    return mesh(tensor).size(_dimension(tensor))


def rank(tensor: Tensor) -> int:
    return mesh(tensor).get_local_rank(_dimension(tensor))


def group(tensor: Tensor) -> dist.ProcessGroup:
    return mesh(tensor).get_group(_dimension(tensor))


def share(tensor: Tensor) -> int:
    """Return the number of values on every rank but the last ones."""
    rows = tensor.shape[0]
    return -(-rows // ranks(tensor)) * (tensor.numel() // max(rows, 1))


def _dimension(tensor: Tensor) -> int:
    """Return the dimension of the mesh over which the rows are split; HSDP has another that replicates them."""
    return next(i for i, place in enumerate(_dtensor(tensor).placements) if place.is_shard())


def _dtensor(tensor: Tensor) -> "DTensor":
    return tensor  # type: ignore[return-value]
