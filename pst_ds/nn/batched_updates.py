"""Per-user low-rank updates added to the layers of a model, dense or packed: y = layer(x) + beta (x V') U'.

The layers stay the modules that they are, and get a forward hook; an update of one user trains, and in a batch each
sample may have the update of another user, or none.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pst_ds.core.updates.rows import EachBeside, beside, with_beside_each

LEFT, RIGHT = "personal_U", "personal_V"
"""Parameter names of a layer's U (O, r) and V (r, I)."""


def add_update(
    layer: nn.Module, name: str, *, outputs: int, inputs: int, rank: int, beta: float, seed: int, dtype: torch.dtype,
    device: torch.device,
) -> dict[str, nn.Parameter]:  # fmt: skip
    """Add a trainable update to ``layer``; return U, zeros, and V, drawn from ``seed`` and ``name``, by name.

    Call it before ``deepspeed.initialize``, which splits them like the layer's other parameters.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{RIGHT}".encode()))
    right = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    made = {LEFT: torch.zeros(outputs, rank), RIGHT: right}
    params = {part: nn.Parameter(values.to(device=device, dtype=dtype)) for part, values in made.items()}
    for part, param in params.items():
        layer.register_parameter(part, param)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        left, right = (module.get_parameter(part) for part in (LEFT, RIGHT))
        return output + beside(args[0].to(output.dtype), left, right, beta)

    layer.register_forward_hook(hook)
    return {f"{name}.{part}": param for part, param in params.items()}


@dataclass(slots=True)
class _Stacked:
    """The updates of one layer for a batch on an accelerator: U (B, O, r) and V (B, r, I)."""

    left: Tensor
    right: Tensor
    beta: float

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y + beta (x V') U' of each sample, (B, ..., O)."""
        return with_beside_each(y, x, self.left, self.right, self.beta)


class BatchUpdates:
    """The updates of the users of a batch for some layers of a model; none at first.

    A switch of users takes their factors as they are on a CPU, and stacks those of several on an accelerator; neither
    touches a weight.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, Sequence[int]], beta: float):
        """``shapes``: shapes of U and V by name in ``model``. Raises KeyError or ValueError if they do not fit."""
        self._beta = beta
        self._now: dict[str, _Stacked | EachBeside] = {}
        self._handles: list[RemovableHandle] = []
        self._layers = sorted({name.rpartition(".")[0] for name in shapes})
        modules = dict(model.named_modules())
        for name in self._layers:
            outputs, inputs = shapes[f"{name}.{LEFT}"][0], shapes[f"{name}.{RIGHT}"][1]
            found = features(modules[name])
            if found != (outputs, inputs):
                raise ValueError(f"{name} has {found} outputs and inputs, and the updates ({outputs}, {inputs})")
        for name in self._layers:
            self._handles.append(modules[name].register_forward_hook(self._hook(name)))

    def assign(self, states: Sequence[Mapping[str, Tensor] | None], like: Tensor) -> None:
        """Let sample i of every batch from now on have the update ``states[i]``, or none for None; on the device of
        ``like``, in its dtype on an accelerator, and as they are on a CPU. Without any state nothing is added, or
        held."""
        self._now = {}
        if all(state is None for state in states):
            return
        if like.device.type == "cpu":
            self._assign_where_they_are(states)
            return
        first = states[0]
        one_user = first is not None and all(state is first for state in states)
        keys = [f"{name}.{part}" for name in self._layers for part in (LEFT, RIGHT)]
        found = _together(states[:1] if one_user else states, keys, like.dtype, like.device)
        if one_user:
            found = {key: values.expand(len(states), -1, -1) for key, values in found.items()}
        for name in self._layers:
            self._now[name] = _Stacked(found[f"{name}.{LEFT}"], found[f"{name}.{RIGHT}"], self._beta)

    def _assign_where_they_are(self, states: Sequence[Mapping[str, Tensor] | None]) -> None:
        for name in self._layers:
            left, right = f"{name}.{LEFT}", f"{name}.{RIGHT}"
            factors = [None if state is None else (state[left], state[right]) for state in states]
            self._now[name] = EachBeside(factors, self._beta)

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._now = {}

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            now = self._now.get(name)
            if now is None:
                return None
            return now.added_to(output, args[0])

        return hook


def _together(
    states: Sequence[Mapping[str, Tensor] | None], keys: Sequence[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return {key: (states, ..., ...)}, zeros for None: views of one tensor, which leaves no holes in memory when it
    goes; of a single state that is what is wanted already, its own tensors."""
    first = states[0]
    if (
        len(states) == 1
        and first is not None
        and {(first[key].dtype, first[key].device) for key in keys} == {(dtype, device)}
    ):
        return {key: first[key].unsqueeze(0) for key in keys}
    some = next(state for state in states if state is not None)
    sizes = [len(states) * some[key].numel() for key in keys]
    pool = torch.zeros(sum(sizes), dtype=dtype, device=device)
    found = {}
    for key, piece in zip(keys, pool.split(sizes), strict=True):
        found[key] = piece.view(len(states), *some[key].shape)
        for place, state in zip(found[key], states, strict=True):
            if state is not None:
                place.copy_(state[key])
    return found


def features(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer, which may be a ``Conv1D``."""
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = module.get_parameter("weight")
    return weight.shape[1], weight.shape[0]
