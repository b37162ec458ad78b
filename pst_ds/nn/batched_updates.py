"""Per-user low-rank updates of the layers of a model, dense or packed: y = layer(x) + beta (x V') U'.

Layers are not replaced but get a forward hook. An update of one user can be trained; in a batch, each sample may have
the update of another user, or none.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pst_ds.core.updates.rows import beside, with_beside_each
from pst_ds.nn.model_structure import linear_shape

LEFT, RIGHT = "personal_U", "personal_V"
"""Parameter names of a layer's U (O, r) and V (r, I)."""
State = Mapping[str, Tensor] | None
"""U and V of every layer for one user, by name; None for no update."""


def add_update(
    layer: nn.Module, name: str, *, outputs: int, inputs: int, rank: int, beta: float, seed: int, dtype: torch.dtype,
    device: torch.device,
) -> dict[str, nn.Parameter]:  # fmt: skip
    """Add a trainable update to ``layer``; return U, initially 0, and V, drawn from ``seed`` and ``name``, by name.

    Call it before ``deepspeed.initialize``, which partitions them like the layer's other parameters.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{RIGHT}".encode()))
    right = torch.randn(rank, inputs, generator=generator) / inputs**0.5
    made = {LEFT: torch.zeros(outputs, rank), RIGHT: right}
    params = {part: nn.Parameter(values.to(device=device, dtype=dtype)) for part, values in made.items()}
    for part, param in params.items():
        layer.register_parameter(part, param)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        left, right = (module.get_parameter(part) for part in (LEFT, RIGHT))
        return output + beside(args[0].to(output.dtype), left, right, beta)

    layer.register_forward_hook(hook)
    return {f"{name}.{part}": param for part, param in params.items()}


class BatchUpdates:
    """The updates of the users of a batch for some layers of a model; initially none.

    The updates of several users are stacked. No weight is changed.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, Sequence[int]], beta: float):
        """``shapes``: shapes of U and V by name in ``model``. Raises KeyError or ValueError if they do not fit."""
        self._beta = beta
        self._now: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        """Function that adds the update to (outputs, inputs) of a layer, by its name."""
        self._layers = sorted({name.rpartition(".")[0] for name in shapes})
        modules = dict(model.named_modules())
        for name in self._layers:
            outputs, inputs = shapes[f"{name}.{LEFT}"][0], shapes[f"{name}.{RIGHT}"][1]
            found = linear_shape(modules[name])
            if found != (outputs, inputs):
                raise ValueError(f"{name} has {found} outputs and inputs, and the updates ({outputs}, {inputs})")
        self._handles = [modules[name].register_forward_hook(partial(self._add, name)) for name in self._layers]

    def assign(self, states: Sequence[State], like: Tensor) -> None:
        """Let sample i of every later batch have the update ``states[i]``, in the dtype and device of ``like``."""
        self._now = {}
        if all(state is None for state in states):
            return
        first = states[0]
        keys = [f"{name}.{part}" for name in self._layers for part in (LEFT, RIGHT)]
        if first is not None and all(state is first for state in states):  # of one user
            found = {key: first[key].to(like.device, like.dtype).expand(len(states), -1, -1) for key in keys}
        else:
            found = _stacked(states, keys, like.dtype, like.device)
        for name in self._layers:
            factors_of_all = {"left": found[f"{name}.{LEFT}"], "right": found[f"{name}.{RIGHT}"]}
            self._now[name] = partial(with_beside_each, **factors_of_all, beta=self._beta)

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._now = {}

    def _add(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        add = self._now.get(name)
        return None if add is None else add(output, args[0])


def _stacked(
    states: Sequence[State], keys: Sequence[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return {key: (states, ..., ...)}, 0 for None: views of one tensor, whose release does not fragment memory."""
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
