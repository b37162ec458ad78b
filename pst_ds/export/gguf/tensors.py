"""Tensors of a GGUF file: their names, types and places, and the bytes of what a model has of them.

An expert's matrix is a tensor by itself in a model's files; in a GGUF file all experts' are one, (E, O, I), which is
filled expert by expert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pst_ds.export.gguf.families import Config, Family
from pst_ds.export.manifest import ExportError
from pst_ds.export.plan import PlannedTensor, TensorValues
from pst_ds.formats.gguf_blocks import BLOCK, gguf_blocks
from pst_ds.formats.rows import as_bools

_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
_OF_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_CORRECTION = ".e_score_correction_bias", ".e_score_correction.bias"
"""What is added to a router's gates where it chooses, in transformers and in the map of names."""
_ROUTERS = (".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")


@dataclass(frozen=True, slots=True)
class GgufPiece:
    """A tensor of the model: one of the file, or an expert's share of one."""

    name: str
    """In the file."""
    expert: int | None
    shape: tuple[int, ...]
    """Of what is written: bytes, where it is blocks, or of 16 bits."""
    kind: Any
    """ggml's type."""
    numpy: type[np.generic]
    output: PlannedTensor
    heads: int = 0
    """Of a query's or key's projection, whose rows are put in another order."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.numpy).itemsize

    def data(self, values: TensorValues) -> tuple[NDArray[np.generic], int]:
        """Return (the array to write, number of scales that fp16 does not hold exactly). Raises ExportError."""
        tensor, grid = values.tensor.to(self.output.dtype), self.output.grid
        if grid is None:
            tensor = _for_neighbours(tensor, self.heads).contiguous()
            return (tensor.float() if self.numpy is np.float32 else tensor.view(torch.uint8)).numpy(), 0
        keep = None if values.keep is None else as_bools(values.keep, tensor.shape[1])
        try:
            blocks, changed = gguf_blocks(tensor, keep, grid, values.scales)
        except ValueError as error:
            raise ExportError(f"{self.output.name}: {error}") from None
        return _for_neighbours(blocks, self.heads).contiguous().numpy(), changed


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    numpy: type[np.generic]
    nbytes: int
    is_rounded: bool = False


class GgufPlan:
    """What a GGUF file of a family holds of a model's tensors. Raises ExportError where one has no place there."""

    def __init__(self, outputs: Sequence[PlannedTensor], config: Config, family: Family, library: Any):
        self._config, self._family, self._kinds = config, family, library.GGMLQuantizationType
        architectures = {name: number for number, name in library.MODEL_ARCH_NAMES.items()}
        architecture = architectures.get(family.architecture)
        if architecture is None:
            raise ExportError(f"this version of the package gguf has no {family.architecture}: pip install -U gguf")
        self._names = library.get_tensor_name_map(architecture, config.num_hidden_layers)
        self.pieces = [self._piece(output) for output in outputs]
        """Of the outputs, in their order."""
        by_name: dict[str, list[GgufPiece]] = {}
        for piece in self.pieces:
            by_name.setdefault(piece.name, []).append(piece)
        self.tensors = [self._tensor(name, pieces) for name, pieces in by_name.items()]

    def _piece(self, output: PlannedTensor) -> GgufPiece:
        of_expert = _OF_EXPERT.fullmatch(output.name)
        merged = f"{of_expert[1]}.{of_expert[3]}" if of_expert else output.name.replace(*_CORRECTION)
        name = self._names.get_name(merged, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"{output.name} has no name in a GGUF file of a {self._family.architecture}")
        shape, kind, numpy = self._stored(output, name)
        return GgufPiece(
            name, int(of_expert[2]) if of_expert else None, shape, kind, numpy, output, self._heads(output)
        )

    def _stored(self, output: PlannedTensor, name: str) -> tuple[tuple[int, ...], Any, type[np.generic]]:
        """(shape of what is written, ggml's type, numpy's type)."""
        *rows, columns = output.shape
        if output.grid is not None:
            if columns % BLOCK:
                raise ExportError(f"{output.name} has {columns} inputs, and GGUF's blocks have {BLOCK}")
            width = columns // BLOCK * (2 + BLOCK * output.grid.bits // 8)
            return (*rows, width), self._kinds.Q8_0 if output.grid.bits == 8 else self._kinds.Q4_0, np.uint8
        halves = {torch.bfloat16: self._kinds.BF16, torch.float16: self._kinds.F16}
        # llama.cpp takes vectors in fp32 alone; with routers in 16 bits it would round what they multiply, too
        if not rows or name.endswith(_ROUTERS) or output.dtype not in halves:
            return output.shape, self._kinds.F32, np.float32
        return (*rows, 2 * columns), halves[output.dtype], np.uint8

    def _heads(self, output: PlannedTensor) -> int:
        owner = output.name.rpartition(".")[0]
        if not self._family.rotates_neighbours or not owner.endswith(_ROTATED):
            return 0
        heads: int = self._config.num_attention_heads
        shared = getattr(self._config, "num_key_value_heads", None)
        return shared or heads if owner.endswith(_ROTATED[1]) else heads

    def _tensor(self, name: str, pieces: list[GgufPiece]) -> GgufTensor:
        """The tensor that these pieces are in the file."""
        first, rounded = pieces[0], pieces[0].output.grid is not None
        if first.expert is None:
            if len(pieces) > 1:
                raise ExportError(f"{pieces[1].output.name} would be {name} in the file, as {first.output.name} is")
            return GgufTensor(name, first.shape, first.kind, first.numpy, first.nbytes, rounded)
        count, places = num_experts(self._config), {piece.expert for piece in pieces}
        kinds = {(piece.shape, piece.kind) for piece in pieces}
        if places != set(range(count)) or len(pieces) != count or len(kinds) > 1:
            raise ExportError(
                f"{first.output.name} is not of {count} experts of one shape and dtype, which GGUF stacks"
            )
        return GgufTensor(name, (count, *first.shape), first.kind, first.numpy, count * first.nbytes, rounded)


def num_experts(config: Config) -> int:
    """Return the experts of a block by a model's text config; 0 of a dense model."""
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0


def _for_neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Put the rows of a query's or key's projection in the order of :attr:`Family.rotates_neighbours`."""
    if not heads:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
