"""fp32 masters that MasterAdamW, or DeepSpeed at stage 0, keeps as an attribute of their parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pst_ds.parallel.sharding.registry import sharding_of

_DIFFERS = "pst_differs_from_master"
"""Attribute of a parameter whose master has other values on purpose."""


def let_differ(param: nn.Parameter) -> None:
    """Keep the master of ``param`` even if the parameter has other values from now on."""
    setattr(param, _DIFFERS, True)


def differs_from_master(param: nn.Parameter) -> bool:
    """Return whether :func:`let_differ` was called."""
    return hasattr(param, _DIFFERS)


def kept_masters(params: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the full fp32 masters that MasterAdamW, or DeepSpeed at stage 0, keeps of ``params``.

    None for a parameter without master, or overwritten since, under FSDP2 in this rank's rows. The host waits once for
    the comparison.
    """
    masters: dict[int, Tensor] = {}
    same: list[Tensor] = []
    for i, param in enumerate(params):
        master = getattr(param, "fp32_master", None)
        if master is None or master.shape != param.shape:
            continue
        masters[i] = master.detach()
        # compared in the parameter's dtype, to which the optimizer rounds the master
        kept_rows = sharding_of(masters[i]).rows(masters[i])
        rows = sharding_of(param).rows(param)
        same.append((kept_rows.to(rows.dtype) == rows).all())
    # One tensor for all flags, since each call of tolist waits for the device.
    flags: list[bool] = []
    if same:
        flags = torch.stack([flag.to(same[0].device) for flag in same]).tolist()
    kept: list[Tensor | None] = [None] * len(params)
    for (i, master), is_same in zip(masters.items(), flags, strict=True):
        if is_same or differs_from_master(params[i]):
            kept[i] = master.to(params[i].device)
    return kept
