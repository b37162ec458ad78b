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
        kept_rows = sharding_of(masters[i]).rows(masters[i])
        rows = sharding_of(param).rows(param)
        same.append((kept_rows.to(rows.dtype) == rows).all())
    # One tensor for all flags, since each call of tolist waits for the device.
    flags = torch.stack([flag.to(same[0].device) for flag in same]).tolist() if same else []
    current = {i: flag or differs_from_master(params[i]) for i, flag in zip(masters, flags, strict=True)}
    return [masters[i].to(param.device) if current.get(i) else None for i, param in enumerate(params)]
