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
        stack = self.stack
        experts = max(1, stack.num_experts // self.of)  # a matrix of an expert is laid out like one expert
        outputs = stack.out_features // self.of
        matrices = stack.num_matrices // self.of
        return WeightLayout(
            out_features=outputs,
            in_features=stack.in_features,
            transposed=stack.transposed,
            num_matrices=matrices,
            num_experts=experts,
        )

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
        # the range is empty, since only the index of the piece and the number of pieces are used
        run = StackRun(whole, first=0, last=0, of=whole.num_experts * per_expert)
        return run, kept[expert] * per_expert + part

    def share(self, count: int, piece: int | None = None) -> tuple[int, int]:
        """Return the range of the run, or of one piece, in ``count`` values that are stored expert by expert."""
        per_piece = count // self.of
        if piece is None:
            return self.first * per_piece, self.last * per_piece
        return piece * per_piece, (piece + 1) * per_piece


def all_experts(layout: WeightLayout) -> StackRun:
    """Return a whole stack, expert by expert; any other layer as one piece."""
    return StackRun(layout, first=0, last=layout.num_experts, of=layout.num_experts)


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
    numbers = torch.arange(height).view(layout.num_experts, -1, 1)  # (experts, rows of an expert, 1)
    counts = {layout.num_experts}
    if not layout.transposed:
        # the matrices of a transposed expert lie side by side in its rows
        counts.add(layout.num_matrices)
    parts: list[FilePart] = []
    for part, rows in saved_tensors(model, {name: numbers}).items():
        flat = rows.flatten()
        first = int(flat[0])
        last = first + flat.numel()
        fitting = [n for n in sorted(counts) if not first % (height // n) and not last % (height // n)]
        if rows.shape[-1] != 1 or not torch.equal(flat, torch.arange(first, last)) or not fitting:
            raise ValueError(part)
        # whole experts where possible, since they are fewer and larger pieces than their matrices
        num_pieces = fitting[0]
        rows_of_piece = height // num_pieces
        run = StackRun(layout, first=first // rows_of_piece, last=last // rows_of_piece, of=num_pieces)
        parts.append(FilePart(part, run, (*rows.shape[:-1], width)))
    return parts


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
    stacks: list[FolderStack] = []
    for name, layout in known_stacks(model).items():
        stack = _stack(model, name, layout, weights)
        if stack is not None:
            stacks.append(stack)
    return stacks


def _stack(model: nn.Module, name: str, layout: WeightLayout, weights: BaseWeights) -> FolderStack | None:
    """Return the stack ``name`` of a folder; None if its tensors are incomplete, or not rows of it in their order."""
    shape = tuple(model.get_parameter(name).shape)
    try:
        pieces = sorted(parts_in_files(model, name, layout), key=lambda piece: piece.run.rows)
    except ValueError:  # the files have the rows in another order
        return None
    in_one = weights.find(name)
    if in_one is not None:
        whole = FilePart(name, all_experts(layout), shape)
        return FolderStack(name=name, layout=layout, shape=shape, pieces=(whole,), stored=(in_one,))
    stored: list[str] = []
    dtypes = set[torch.dtype]()
    for piece in pieces:
        in_files = weights.find(piece.name)
        if in_files is None:
            continue
        dtype, stored_shape = weights.size(in_files)
        if stored_shape != piece.shape:
            return None
        stored.append(in_files)
        dtypes.add(dtype)
    # without any of them the stack is packed
    if len(stored) not in (0, len(pieces)) or len(dtypes) > 1:
        return None
    return FolderStack(name=name, layout=layout, shape=shape, pieces=tuple(pieces), stored=tuple(stored))


def kept_experts(model: nn.Module, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return the experts that a run has not removed, by the name of the block's module around them.

    ``model``: the run's model with all experts, maybe on the meta device.
    """
    kept_in_block: dict[str, tuple[int, ...]] = {}
    for router in pst_routers(model).values():
        # an expert is removed from all stacks of its block, so the mask of one of them tells
        stack = f"{router.experts}.{stack_names(model.get_submodule(router.experts))[0]}"
        layout = pst_layers(model)[stack].layout
        kept: list[int] = []
        for expert in range(layout.num_experts):
            first, last = layout.expert_range(expert)
            if checkpoint.mask_bits(stack, first, last).any():
                kept.append(expert)
        block = router.experts.rpartition(".")[0]
        kept_in_block[block] = tuple(kept)
    return kept_in_block
