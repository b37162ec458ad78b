"""Model families that llama.cpp computes as transformers does, and the tensors of their GGUF files.

Model folders may store each expert's matrix as a tensor. A GGUF file stacks all experts in one tensor (E, O, I), which
is filled expert by expert.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pst_ds.formats.gguf_blocks import BLOCK, gguf_blocks
from pst_ds.formats.rows import as_bools
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.plan import TensorSpec, TensorValues

Config = Any
"""A transformers config; its settings differ between families."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models in transformers, as llama.cpp reads it."""

    architecture: str
    """Name in llama.cpp."""
    rotates_neighbours: bool = False
    """True if dimension 2 i of a head is rotated with 2 i + 1, and not i with i + d / 2 as in transformers."""
    has_sigmoid_gates: bool = False
    """True if router gates are sigmoids instead of a softmax."""
    only_with: Mapping[str, object] = field(default_factory=dict)
    """Settings that GGUF cannot express, and the values that llama.cpp assumes."""


_FULL_ATTENTION = {"use_sliding_window": False}
_FAMILIES = {
    "llama": Family("llama", rotates_neighbours=True),
    "mistral": Family("llama", rotates_neighbours=True),
    "mixtral": Family("llama", rotates_neighbours=True, only_with={"sliding_window": None}),
    "qwen2": Family("qwen2", only_with=_FULL_ATTENTION),
    "qwen3": Family("qwen3", only_with=_FULL_ATTENTION),
    "qwen2_moe": Family("qwen2moe", only_with={"norm_topk_prob": False, **_FULL_ATTENTION}),
    "qwen3_moe": Family("qwen3moe", only_with={"norm_topk_prob": True, **_FULL_ATTENTION}),
    "glm4_moe": Family("glm4moe", has_sigmoid_gates=True, only_with={"n_group": 1}),
    "olmoe": Family("olmoe", only_with={"norm_topk_prob": False, "clip_qkv": None}),
}
"""Families by ``model_type``."""


def family_of(config: Config) -> Family:
    """Return the family of a model's text config. Raises ExportError if llama.cpp would compute something else."""
    kind = config.model_type
    family = _FAMILIES.get(kind)
    if family is None:
        raise ExportError(f"model_type = {kind}: GGUF export supports {', '.join(_FAMILIES)}. Choose another format")
    for setting, value in family.only_with.items():
        setting_of_model = getattr(config, setting, value)
        if setting_of_model != value:
            raise ExportError(
                f"{setting} = {json.dumps(setting_of_model)} in the config of this {kind}, but llama.cpp computes the "
                f"family with {json.dumps(value)}. Choose another format"
            )
    return family


_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")
_OF_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_CORRECTION = (".e_score_correction_bias", ".e_score_correction.bias")
"""Bias added to router gates when experts are chosen: names in transformers and in gguf's name map."""
_ROUTERS = (".ffn_gate_inp.weight", ".ffn_gate_inp_shexp.weight")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file, or one expert's part of it."""

    name: str
    """Name in the file."""
    shape: tuple[int, ...]
    """Shape of the array that is written; in bytes for quantised blocks and 16-bit values."""
    kind: object
    """Type in ggml."""
    numpy: type[np.generic]
    output: TensorSpec
    """Tensor of the model: this one, or the first expert's."""
    expert: int | None = None
    heads: int = 0
    """Heads of a query or key projection whose rows are reordered; 0 for other tensors."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.numpy).itemsize

    def data(self, values: TensorValues) -> tuple[NDArray[np.generic], int]:
        """Return (the array to write, number of scales that fp16 does not hold exactly). Raises ExportError."""
        tensor = values.tensor.to(self.output.dtype)
        grid = self.output.grid
        if grid is None:
            tensor = _for_neighbours(tensor, self.heads).contiguous()
            if self.numpy is np.float32:
                return tensor.float().numpy(), 0
            return tensor.view(torch.uint8).numpy(), 0  # numpy has no bf16
        keep: Tensor | None = None
        if values.keep is not None:
            keep = as_bools(values.keep, tensor.shape[1])
        try:
            blocks, changed = gguf_blocks(tensor, keep, grid, values.scales)
        except ValueError as error:
            raise ExportError(f"{self.output.name}: {error}") from None
        # after quantisation, because scales and mask have the model's order of rows; a row's blocks stay together
        return _for_neighbours(blocks, self.heads).contiguous().numpy(), changed


class GgufPlan:
    """The tensors of a GGUF file. Raises ExportError if a tensor of the model has no place in it."""

    def __init__(self, outputs: Sequence[TensorSpec], config: Config, family: Family, library: ModuleType):
        self._config = config
        self._family = family
        self._kinds = library.GGMLQuantizationType
        architectures = {name: number for number, name in library.MODEL_ARCH_NAMES.items()}
        architecture = architectures.get(family.architecture)
        if architecture is None:
            raise ExportError(
                f"the installed package gguf does not know {family.architecture}. Run pip install -U gguf"
            )
        self._names = library.get_tensor_name_map(architecture, config.num_hidden_layers)
        self.pieces = [self._piece(output) for output in outputs]
        """Pieces in the order of the outputs."""
        by_name: dict[str, list[GgufTensor]] = {}
        for piece in self.pieces:
            by_name.setdefault(piece.name, []).append(piece)
        self.tensors = [self._tensor(name, pieces) for name, pieces in by_name.items()]
        """Tensors in the order of their first pieces."""

    def _piece(self, output: TensorSpec) -> GgufTensor:
        """Return the tensor of the file for an output, or its part of a stack of experts. Raises ExportError."""
        of_expert = _OF_EXPERT.fullmatch(output.name)
        expert: int | None = None
        if of_expert:
            experts, number, part = of_expert.groups()
            expert = int(number)
            merged = f"{experts}.{part}"  # the name of the stack, which all its experts share
        else:
            in_transformers, in_name_map = _CORRECTION
            merged = output.name.replace(in_transformers, in_name_map)
        name = self._names.get_name(merged, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(
                f"{output.name} has no name in GGUF files of {self._family.architecture}. Choose another format"
            )
        shape, kind, numpy = self._stored(output, name)
        return GgufTensor(
            name=name, shape=shape, kind=kind, numpy=numpy, output=output, expert=expert, heads=self._heads(output)
        )

    def _stored(self, output: TensorSpec, name: str) -> tuple[tuple[int, ...], object, type[np.generic]]:
        """Return (shape of the written array, ggml type, numpy type)."""
        *rows, columns = output.shape
        if output.grid is not None:
            if columns % BLOCK:
                raise ExportError(
                    f"{output.name} has {columns} inputs, not a multiple of GGUF's block size {BLOCK}. Leave values "
                    "unset"
                )
            block_bytes = 2 + BLOCK * output.grid.bits // 8  # an fp16 scale, and the codes
            kind = self._kinds.Q4_0
            if output.grid.bits == 8:
                kind = self._kinds.Q8_0
            return (*rows, columns // BLOCK * block_bytes), kind, np.uint8
        halves = {torch.bfloat16: self._kinds.BF16, torch.float16: self._kinds.F16}
        # llama.cpp needs vectors in fp32; with 16-bit routers it would also round the activations
        if not rows or name.endswith(_ROUTERS) or output.dtype not in halves:
            return output.shape, self._kinds.F32, np.float32
        return (*rows, 2 * columns), halves[output.dtype], np.uint8

    def _heads(self, output: TensorSpec) -> int:
        """Return the heads of a query or key projection whose rows are reordered; 0 for other tensors."""
        owner = output.name.rpartition(".")[0]
        if not self._family.rotates_neighbours or not owner.endswith(_ROTATED):
            return 0
        heads: int = self._config.num_attention_heads
        _, keys = _ROTATED
        if owner.endswith(keys):
            return getattr(self._config, "num_key_value_heads", None) or heads
        return heads

    def _tensor(self, name: str, pieces: list[GgufTensor]) -> GgufTensor:
        """Return the tensor of the file that consists of these pieces. Raises ExportError."""
        first = pieces[0]
        if first.expert is None:
            if len(pieces) > 1:
                raise ExportError(f"{pieces[1].output.name} and {first.output.name} would both be {name} in the file")
            return first
        count = num_experts(self._config)
        # a gap would stay zero in the file, and two pieces for one place would overwrite each other
        places = {piece.expert for piece in pieces}
        kinds = {(piece.shape, piece.kind) for piece in pieces}
        if places != set(range(count)) or len(pieces) != count or len(kinds) > 1:
            raise ExportError(
                f"{first.output.name}: GGUF stacks experts, and these are not {count} of one shape and dtype"
            )
        return replace(first, expert=None, shape=(count, *first.shape))


def num_experts(config: Config) -> int:
    """Return the number of experts per block in a text config; 0 for a dense model."""
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0


def _for_neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection for :attr:`Family.rotates_neighbours`."""
    if not heads:
        return tensor
    halves = tensor.unflatten(0, (heads, 2, -1))  # (heads, 2, d / 2, ...)
    return halves.transpose(1, 2).flatten(0, 2)  # row i and row i + d / 2 of a head become neighbours
