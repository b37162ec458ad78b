"""Launch the kernels for a layer's merged weight and for the backward pass of bands of G, or of experts."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pst_ds.core.bits import shard_numel
from pst_ds.core.factors import Constants, Factors, TileFactors, tile_factors
from pst_ds.core.kernels.triton.launch import blocks, launch, serves
from pst_ds.core.layout import Rect, WeightLayout

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Limits of the kernels' 32-bit positions in a shard and of their estimate of a shard's number.
_MOST_PER_SHARD = 1 << 30
_MOST_SHARDS = 1 << 21


@dataclass(frozen=True, slots=True)
class MaskBits:
    """The mask of a stored weight with rows of ``width``, in shards of ``per_shard``; see :mod:`pst_ds.core.bits`."""

    bits: Tensor
    width: int
    per_shard: int
    pad: int
    """Unused bits between two shards."""

    @property
    def is_aligned(self) -> bool:
        """True if every row of the stored weight, and every shard, starts at a byte boundary."""
        return self.width % 8 == 0 and self.pad == 0

    def holds(self, rect: Rect) -> bool:
        """Return whether every row of ``rect`` starts at a byte boundary."""
        return self.is_aligned and rect.c0 % 8 == 0


def mask_bits(bits: Tensor, shape: tuple[int, int], num_shards: int) -> MaskBits:
    """Return the mask of a stored weight of ``shape``."""
    per_shard = shard_numel(shape[0] * shape[1], num_shards)
    return MaskBits(bits, shape[1], per_shard, -per_shard % 8 if num_shards > 1 else 0)


def supports(dtype: torch.dtype | None, numel: int, num_shards: int) -> bool:
    """Return whether the kernels merge a layer of ``numel`` weights, and compute its gradients.

    ``dtype``: None for quantised weights. Shards may start at any bit. Requires a device that
    :func:`pst_ds.core.kernels.triton.launch.serves` names.
    """
    if dtype not in _DTYPES:
        return False
    per_shard = shard_numel(numel, num_shards)
    if num_shards == 1 or per_shard % 8 == 0:
        return True
    # eight weights of a vector then lie in at most two shards
    return 8 <= per_shard < _MOST_PER_SHARD and num_shards < _MOST_SHARDS


def kernel_mask(weight: object, bits: Tensor, shape: tuple[int, int], num_shards: int) -> MaskBits | None:
    """Return the mask as the kernels take it, or None if they do not support a layer with this weight."""
    dtype = weight.dtype if isinstance(weight, Tensor) else None
    if not supports(dtype, shape[0] * shape[1], num_shards) or not serves(bits.device):
        return None
    return mask_bits(bits, shape, num_shards)


@dataclass(frozen=True, slots=True)
class Matrices:
    """Equal matrices of a stored weight that a launch computes."""

    shape: tuple[int, int]
    """Rows and columns of each."""
    first: int
    """Flat index in the stored weight of the first weight."""
    count: int = 1
    parts: int = 1
    """Matrices per expert."""
    expert_step: int = 0
    """Weights from an expert to the next, and from a part to the next."""
    part_step: int = 0

    @classmethod
    def of_rect(cls, rect: Rect, width: int) -> Self:
        """Return a rectangle of a stored weight with rows of ``width``."""
        return cls(rect.shape, rect.r0 * width + rect.c0)

    @classmethod
    def of_experts(cls, layout: WeightLayout, experts: range) -> Self:
        """Return all matrices of some experts of a stack; a layer that is not a stack is one expert."""
        rect = layout.matrices()[0].rect
        parts = layout.num_matrices // layout.num_experts
        numel = layout.expert.numel
        part_step = rect.shape[1] if layout.transposed else rect.numel
        return cls(rect.shape, experts.start * numel, len(experts) * parts, parts, numel, part_step)


def merge_layer(weight: Tensor, mask: MaskBits, layout: WeightLayout, factors: Factors, constants: Constants) -> Tensor:
    """Return M . (W0 + beta U V) of a whole layer, or stack of experts, in storage shape, in one launch."""
    from pst_ds.core.kernels.triton import merge_kernels as kernels

    weight = weight.contiguous()
    matrices = Matrices.of_experts(layout, range(layout.num_experts))
    matrix = layout.matrices()[0]
    tile = tile_factors(factors, layout, matrix, matrix.rect)
    merged = torch.empty_like(weight)
    block = kernels.TILE_ROWS, kernels.TILE_COLS
    grid, arguments, shapes = _merged(
        weight=weight,
        mask=mask,
        matrices=matrices,
        tile=tile,
        constants=constants,
        block=block,
        has_many=matrices.count > 1,
    )
    launch(kernels.merge, grid, *arguments, merged, merged.stride(0), fuse=True, **shapes)
    return merged


def gradients_into(
    merged: Tensor,
    scores: Tensor | None,
    updates: Tensor | None,
    weight: Tensor,
    grad: Tensor,
    mask: MaskBits,
    matrices: Matrices,
    tile: TileFactors,
    constants: Constants,
    factor: float | Tensor,
    ends: Tensor | None = None,
) -> None:
    """Write M . W to ``merged``, G . W to ``scores`` and G . M + ``factor`` G . |W| . 1 n' to ``updates``.

    All have contiguous rows. ``merged``, ``weight`` and ``grad`` have the matrices in storage order;
    ``scores`` and ``updates`` have one matrix below the other. ``tile``: factors of the first matrix; the next
    matrix's follow in memory. ``factor``: 0.0 if |W| has no gradient, or fp32 per matrix. ``ends``: int32, of the rows
    of all experts of a stack; G counts as 0 for experts without rows.
    """
    from pst_ds.core.kernels.triton import merge_kernels as kernels

    grid, arguments, shapes = _merged(
        weight=weight,
        mask=mask,
        matrices=matrices,
        tile=tile,
        constants=constants,
        block=(kernels.GRADIENT_ROWS, kernels.GRADIENT_COLS),
        has_many=ends is not None,
    )
    first_expert = 0 if ends is None else matrices.first // matrices.expert_step
    arguments += [grad, grad.stride(0)]
    norm_step = 0  # elements between the norms of a matrix and the next matrix's norms
    for norms in (tile.row_norms, tile.col_norms):
        if norms is not None:
            norms = norms.float().contiguous()
            norm_step = norm_step or norms.numel()
        arguments.append(norms)
    # a factor for all matrices is an argument by value, one per matrix is in memory
    common_factor = 0.0 if isinstance(factor, Tensor) else factor
    factors = factor if isinstance(factor, Tensor) else None
    arguments += [norm_step, common_factor, factors, ends, first_expert]
    for output in (merged, scores, updates):
        arguments += [output, 0 if output is None else output.stride(0)]
    shapes |= {"HAS_MAGNITUDE": factors is not None or common_factor != 0.0}
    launch(kernels.gradients, grid, *arguments, fuse=True, **shapes)


def _merged(
    weight: Tensor,
    mask: MaskBits,
    matrices: Matrices,
    tile: TileFactors,
    constants: Constants,
    block: tuple[int, int],
    has_many: bool,
) -> tuple[tuple[int, int, int], list[object], dict[str, int]]:
    """Return the grid, the kernels' arguments for the merged weight, and their constants."""
    from pst_ds.core.kernels.triton import merge_kernels as kernels

    left = tile.update_left
    right = tile.update_right
    grid = blocks(matrices.shape[0], block[0]), blocks(matrices.shape[1], block[1]), matrices.count
    # without a pad it does not matter where shards end
    per_shard = mask.per_shard if mask.pad else _MOST_PER_SHARD
    arguments: list[object] = [weight, weight.stride(0), *matrices.shape, mask.bits, matrices.first, mask.width]
    arguments += [per_shard, mask.pad, mask.bits.numel()]
    # None removes the arithmetic for several matrices from the compiled kernel
    steps: list[object] = [None, None, None]
    if has_many:
        steps = [matrices.parts, matrices.expert_step, matrices.part_step]
    starts = (matrices.first, matrices.expert_step, matrices.part_step)
    aligned = mask.is_aligned and all(at % 8 == 0 for at in starts)
    shapes: dict[str, int] = {"ALIGNED": aligned, "RANK": 0, "ROWS": block[0], "COLS": block[1]}
    if left is None or right is None:
        return grid, [*arguments, None, 0, 0, None, 0, 0, 0.0, 0, *steps, None, None], shapes
    rank = right.shape[0]
    arguments += [left, *left.stride(), right, *right.stride(), constants.beta, rank, *steps]
    arguments += [left.numel(), right.numel()] if has_many else [None, None]  # from a matrix's factors to the next's
    # a tile's inner size is a power of two; components beyond the rank are read as zeros
    shapes["RANK"] = max(kernels.LEAST_RANK, 1 << (rank - 1).bit_length())
    return grid, arguments, shapes
