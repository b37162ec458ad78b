"""AdamW that keeps an fp32 master of every bf16 parameter, so that small steps add up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT, StateDict

from pst_ds.parallel import sharding

_MASTERS = "masters"
"""Key of the masters in a state dict."""


class MasterAdamW(torch.optim.AdamW):
    """AdamW on fp32 masters of the parameters in its groups, without weight decay in groups that set none.

    An fp32 parameter is its own master, so this is plain AdamW under DeepSpeed, which puts flat fp32 tensors into the
    groups. A master is created when it is first needed, and again after the parameter got other values, such as by the
    model's ``load_state_dict``. :func:`pst_ds.parallel.sharding.fp32_masters` finds masters; :meth:`state_dict` has
    them.
    """

    _taken: list[nn.Parameter] | None = None
    """The masters, between :meth:`take_gradients` and the step."""

    def __init__(self, params: ParamsT, *, fused: bool = False, **settings: Any):
        super().__init__(params, weight_decay=0.0, fused=fused, **settings)
        self._masters: dict[nn.Parameter, nn.Parameter] = {}

    def masters(self) -> list[nn.Parameter]:
        """Return the master of each parameter, in the order of the groups. The host waits once for a comparison."""
        params = self._params()
        apart = [param for param in params if param.dtype != torch.float32]
        # together, so that the host waits once for all of them
        for param, kept in zip(apart, sharding.kept_masters(apart), strict=True):
            master = self._masters.get(param)
            if master is None:
                self._masters[param] = param.fp32_master = nn.Parameter(param.detach().float())  # type: ignore[attr-defined]
            elif kept is None:
                # the parameter got other values; the same object, because AdamW keeps its moments by it
                master.data = param.detach().float()
            elif master.device != kept.device:
                # the model was moved, and kept is the master on the new device
                master.data = kept
        masters: list[nn.Parameter] = []
        for param in params:
            # a parameter that was cast to fp32 since is its own master, although an old master remains
            is_own_master = param.dtype == torch.float32
            masters.append(param if is_own_master else self._masters[param])
        return masters

    def take_gradients(self) -> list[nn.Parameter]:
        """Move the parameters' gradients to their masters, in fp32, and return the masters.

        Until the step, the parameters may get gradients but no other values.
        """
        # new gradients come after a forward pass, before which the parameters may have got other values
        if self._taken is None or any(param.grad is not None for param in self._masters):
            self._taken = self.masters()
        for param, master in zip(self._params(), self._taken, strict=True):
            if master is not param and param.grad is not None:
                master.grad = param.grad.float()
                param.grad = None  # frees the bf16 gradient before AdamW allocates
        return self._taken

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; a parameter with a separate master has no gradient afterwards."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._groups_of(self.take_gradients()):
            super().step()
        self._taken = None
        for param, master in self._masters.items():
            # rounds to the parameter's dtype; the master keeps what was rounded off for the next step
            param.copy_(master)
            master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._taken = None
        for master in self._masters.values():
            master.grad = None

    def state_dict(self) -> StateDict:
        """Return AdamW's state dict with "masters", by the number of their parameter."""
        masters = self.masters()
        with self._groups_of(masters):
            state = super().state_dict()
        numbered: dict[int, torch.Tensor] = {}
        for number, (param, master) in enumerate(zip(self._params(), masters, strict=True)):
            if master is not param:
                numbered[number] = master.detach()
        if not numbered:
            return state  # the one of torch's AdamW, which it and its checkpoints can load
        return state | {_MASTERS: numbered}

    def load_state_dict(self, state_dict: StateDict) -> None:
        masters = self.masters()
        # torch casts loaded moments to the dtype of the parameter in the group: fp32 for a master
        with self._groups_of(masters):
            super().load_state_dict(state_dict)
        for number, values in state_dict.get(_MASTERS, {}).items():
            masters[number].detach().copy_(values)

    def __getstate__(self) -> dict[str, object]:
        """Add the masters for pickle and deepcopy, since torch drops attributes that it does not know."""
        return super().__getstate__() | {"_masters": self._masters}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore a copy. torch's ``load_state_dict`` calls this too, without masters."""
        super().__setstate__(state)
        for param, master in self._masters.items():
            param.fp32_master = master  # type: ignore[attr-defined]

    def _params(self) -> list[nn.Parameter]:
        return [param for group in self.param_groups for param in group["params"]]

    @contextmanager
    def _groups_of(self, masters: list[nn.Parameter]) -> Iterator[None]:
        """Put the ``masters`` into the groups inside the context: AdamW keeps its state by them."""
        params_of_groups = [group["params"] for group in self.param_groups]
        start = 0
        for group, params in zip(self.param_groups, params_of_groups, strict=True):
            group["params"] = masters[start : start + len(params)]
            start += len(params)
        try:
            yield
        finally:
            for group, params in zip(self.param_groups, params_of_groups, strict=True):
                group["params"] = params
