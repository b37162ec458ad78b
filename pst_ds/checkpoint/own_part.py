"""One rank's part of a checkpoint: a copy made between two steps, or the engine's own tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pst_ds.checkpoint.format import MASK, SCALES
from pst_ds.checkpoint.restore import trainable
from pst_ds.core.bits import pack_shard, shard_bytes, shard_range, unpack_range
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.layer import PSTLayer
from pst_ds.parallel import optimizer_state, zero3
from pst_ds.parallel.engine import Engine
from pst_ds.parallel.optimizer_state import Fragment
from pst_ds.parallel.ranks import rank, world_size


class OwnPart:
    """This rank's part of a checkpoint: 12 bytes per trainable value, mask bits, and bytes of quantisation scales.

    :meth:`copy` copies it to host memory, which is kept for the next copy; :meth:`refer` uses the engine's tensors.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._named = trainable(engine.module)
        self._layers = pst_layers(engine.module)
        self.tensors: dict[str, Sequence[Tensor]] = {}
        """Pieces of each tensor of the file, by name: flat, of one dtype, at least one each, in the file's order."""
        self.steps: dict[str, int] = {}
        """Adam's step count of each parameter that this rank has values of."""
        self.cuts: list[tuple[int, int, int]] = []
        """(index of the parameter, start, stop) of its values; empty if all parameters are cut evenly."""
        self._copies: dict[str, Tensor] = {}

    def copy(self) -> None:
        """Copy the engine's current values. Not collective."""
        held = self._own_fragments()
        for kind in optimizer_state.KINDS:
            self._copy_into(kind, optimizer_state.values(self._engine, held, kind), torch.float32)
        self._copy_into(MASK, self._masks(), torch.uint8)
        if scales := self._scales():
            self._copy_into(SCALES, scales, torch.uint8)
        self.tensors = {name: [copy] for name, copy in self._copies.items()}
        self._note(held)

    def refer(self) -> None:
        """Use the engine's own tensors, whose values are those at the time of reading. Not collective."""
        held = self._own_fragments()
        none = torch.empty(0)
        self.tensors = {
            kind: optimizer_state.values(self._engine, held, kind) or [none] for kind in optimizer_state.KINDS
        }
        self.tensors[MASK] = self._masks() or [none.byte()]
        if scales := self._scales():
            self.tensors[SCALES] = scales
        self._note(held)

    def _own_fragments(self) -> list[Fragment]:
        held = optimizer_state.local_fragments(self._engine, self._named)
        if not optimizer_state.is_replicated(param for _, param in self._named):
            return held
        return [fragment.cut(*_even_share(fragment.stop)) for fragment in held]

    def _masks(self) -> list[Tensor]:
        return [_mask_share(layer) for layer in self._layers.values()]

    def _scales(self) -> list[Tensor]:
        return [_scale_share(param) for layer in self._layers.values() if (param := layer.pst_scales) is not None]

    def _copy_into(self, name: str, pieces: Sequence[Tensor], dtype: torch.dtype) -> None:
        sizes = [piece.numel() for piece in pieces]
        if name not in self._copies or self._copies[name].numel() != sum(sizes):
            self._copies[name] = torch.empty(sum(sizes), dtype=dtype)
        if pieces:  # ZeRO-1 and 2 may leave a rank with none
            torch._foreach_copy_(list(self._copies[name].split(sizes)), list(pieces))

    def _note(self, held: list[Fragment]) -> None:
        """Record the steps and cuts of ``held``."""
        self.steps = optimizer_state.adam_steps(self._engine, held)
        self.cuts = []
        if not optimizer_state.is_cut_evenly(param for _, param in self._named):
            index = {name: i for i, (name, _) in enumerate(self._named)}
            self.cuts = [(index[fragment.name], fragment.start, fragment.stop) for fragment in held]


def _mask_share(layer: PSTLayer) -> Tensor:
    """Return the bits of this rank's shard of a mask cut into one shard per rank."""
    bits, numel = layer.pst_mask, layer.layout.numel
    if zero3.is_partitioned(bits):
        return zero3.shard_of(bits).values
    start, stop = _even_share(numel)
    num_bytes = shard_bytes(numel, world_size())
    if layer.num_shards == 1 and start % 8 == 0 and stop - start == 8 * num_bytes:
        return bits.detach()[start // 8 : start // 8 + num_bytes]
    return pack_shard(unpack_range(bits.detach(), numel, layer.num_shards, start, stop), num_bytes)


def _scale_share(param: nn.Parameter) -> Tensor:
    """Return the bytes of this rank's share of a layer's scales."""
    if zero3.is_partitioned(param):
        return zero3.shard_of(param).values
    return param.detach()[slice(*_even_share(param.numel()))]


def _even_share(numel: int) -> tuple[int, int]:
    """Return (first, after the last) of this rank's share of ``numel`` values, as ZeRO-3 cuts them."""
    return shard_range(numel, world_size(), rank())
