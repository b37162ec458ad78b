"""Stacks of experts: which rows of a stack each tensor of the files holds, so that no stack is built as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from pst_ds.checkpoint.format import Checkpoint
from pst_ds.core.layout import WeightLayout
from pst_ds.formats.base_weights import BaseWeights, saved_tensors
from pst_ds.nn.inject import pst_layers
from pst_ds.nn.model_structure import known_stacks, stack_names
from pst_ds.nn.router import pst_routers


@dataclass(frozen=True)
class StackRun:
    """Consecutive pieces of a stack: its experts, or the matrices of its experts. Any other layer is one piece."""

    stack: WeightLayout
    first: int
    """Index of the first piece."""
    last: int
    """Index of the last piece + 1."""
    of: int
    """Number of pieces of the whole stack."""

    @cached_property
    def piece(self) -> WeightLayout:
        """Layout of one piece."""
        stack, count = self.stack, self.of
        experts = max(1, stack.num_experts // count)
        outputs, matrices = stack.out_features // count, stack.num_matrices // count
        return WeightLayout(outputs, stack.in_features, stack.transposed, matrices, experts)

    @property
    def rows(self) -> tuple[int, int]:
        """Range of rows of the stack, viewed in memory as one matrix."""
        height = self.piece.shape[0]
        return self.first * height, self.last * height

    @property
    def num_pieces(self) -> int:
        return self.last - self.first

    def in_whole(self, piece: int, whole: WeightLayout, kept: Sequence[int]) -> "tuple[StackRun, int]":
        """Return the place of a piece in the ``whole`` stack, of which this one has only the experts ``kept``."""
        per_expert = self.of // self.stack.num_experts
        expert, part = divmod(piece, per_expert)
        return StackRun(whole, 0, 0, whole.num_experts * per_expert), kept[expert] * per_expert + part

    def share(self, count: int, piece: int | None = None) -> tuple[int, int]:
        """Return the range of the run, or of one piece, in ``count`` values that are stored expert by expert."""
        first, last = (self.first, self.last) if piece is None else (piece, piece + 1)
        return first * (count // self.of), last * (count // self.of)


def all_experts(layout: WeightLayout) -> StackRun:
    """Return a whole stack, expert by expert; any other layer as one piece."""
    return StackRun(layout, 0, layout.num_experts, layout.num_experts)


@dataclass(frozen=True, slots=True)
class FilePart:
    """A tensor of the files that holds a run of a stack."""

    name: str
    """Name that ``save_pretrained`` gives it."""
    run: StackRun
    shape: tuple[int, ...]


def parts_in_files(model: nn.Module, name: str, layout: WeightLayout) -> list[FilePart]:
    """Return the tensors of the files that the stack ``name`` consists of.

    The row numbers of the stack are passed through transformers' conversion in place of the rows. Raises ValueError,
    with the tensor's name, if it does not consist of whole matrices or experts.
    """
    height, width = layout.shape
    numbers = torch.arange(height).view(layout.num_experts, -1, 1)
    found = []
    for part, rows in saved_tensors(model, {name: numbers}).items():
        flat = rows.flatten()
        first, last = int(flat[0]), int(flat[0]) + flat.numel()
        counts = {layout.num_experts} | (set() if layout.transposed else {layout.num_matrices})
        fitting = [n for n in sorted(counts) if not first % (height // n) and not last % (height // n)]
        if rows.shape[-1] != 1 or not torch.equal(flat, torch.arange(first, last)) or not fitting:
            raise ValueError(part)
        size = height // fitting[0]
        run = StackRun(layout, first // size, last // size, fitting[0])
        found.append(FilePart(part, run, (*rows.shape[:-1], width)))
    return found


@dataclass(frozen=True, slots=True)
class FolderStack:
    """A stack of experts in a folder."""

    name: str
    layout: WeightLayout
    shape: tuple[int, ...]
    """Shape of the Parameter."""
    pieces: tuple[FilePart, ...]
    """Tensors that a dense folder has in its place, in the order of the rows."""
    stored: tuple[str, ...]
    """Names of these tensors in the folder's files; empty if the stack is packed."""


def folder_stacks(model: nn.Module, weights: BaseWeights) -> list[FolderStack]:
    """Return the stacks of ``model`` that a folder holds completely, packed or in tensors of one dtype."""
    found = (_stack(model, name, layout, weights) for name, layout in known_stacks(model).items())
    return [stack for stack in found if stack is not None]


def _stack(model: nn.Module, name: str, layout: WeightLayout, weights: BaseWeights) -> FolderStack | None:
    shape = tuple(model.get_parameter(name).shape)
    try:
        pieces = sorted(parts_in_files(model, name, layout), key=lambda piece: piece.run.rows)
    except ValueError:  # the files have the rows in another order
        return None
    if (own := weights.find(name)) is not None:
        return FolderStack(name, layout, shape, (FilePart(name, all_experts(layout), shape),), (own,))
    stored = [at for piece in pieces if (at := weights.find(piece.name)) is not None]
    if len(stored) not in (0, len(pieces)) or len({weights.size(at)[0] for at in stored}) > 1:
        return None
    if any(weights.size(at)[1] != piece.shape for at, piece in zip(stored, pieces, strict=False)):
        return None
    return FolderStack(name, layout, shape, tuple(pieces), tuple(stored))


def kept_experts(model: nn.Module, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the experts that a run has not removed, by the name of the block's module around them.

    ``model``: the run's model with all experts, maybe on the meta device.
    """
    found = {}
    for router in pst_routers(model).values():
        stack = f"{router.experts}.{stack_names(model.get_submodule(router.experts))[0]}"
        layout = pst_layers(model)[stack].layout
        bits = (checkpoint.mask_bits(stack, *layout.expert_range(expert)) for expert in range(layout.num_experts))
        found[router.experts.rpartition(".")[0]] = tuple(i for i, own in enumerate(bits) if own.any())
    return found
