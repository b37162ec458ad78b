"""y = x (M . W)' + b and its straight-through gradient, tile by tile (arXiv 2205.11005, section 3; G = dL/d(M . W)).

Names: N tokens, O outputs, I inputs, h rows of a tile. The gradient G, as large as the weight, exists one tile at a
time; nothing here keeps a tensor of the weight's size for later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.bits import apply_mask_, unpack_range
from pst_ds.core.factors import Constants, Factors, TileFactors, tile_factors
from pst_ds.core.layout import Block, Rect, WeightLayout, row_tiles
from pst_ds.core.scores import masked_weight, updated_weight

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Weights in a tile of the backward pass: 4 MiB of fp32 on a CPU, enough work to fill a GPU."""


@dataclass(frozen=True, slots=True)
class LayerState:
    """What one layer multiplies with: all tensors whole, as ZeRO-3 has gathered them for the layer's turn."""

    weight: Tensor
    """W0 in storage shape, (O, I), or (I, O) when transposed."""
    bits: Tensor
    """The mask, see :mod:`pst_ds.core.bits`."""
    num_shards: int
    layout: WeightLayout
    factors: Factors
    constants: Constants
    weight_scales: tuple[float, ...]
    """|W| is divided by this in the scores; one for each fused part."""
    scores_train: bool
    """False once the masks are fixed: the scores then have no gradient, nor has |W| through them."""

    def masked_weight(self) -> Tensor:
        return masked_weight(self.weight, self.bits, self.num_shards, self.layout, self.factors, self.constants)


@dataclass(slots=True)
class Gradients:
    """Gradients of a layer, each None unless asked for. Those of the factors are fp32 (fp64 for fp64 input)."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    R: Tensor | None = None
    C: Tensor | None = None
    U: Tensor | None = None
    V: Tensor | None = None

    def factors(self) -> Factors:
        return Factors(self.A, self.B, self.R, self.C, self.U, self.V)


def forward(x: Tensor, bias: Tensor | None, state: LayerState) -> Tensor:
    """y = x (M . W)' + bias: (..., I) to (..., O)."""
    merged = state.masked_weight()
    return torch.nn.functional.linear(x, merged.t() if state.layout.transposed else merged, bias)


def backward(
    x: Tensor,
    grad_y: Tensor,
    state: LayerState,
    *,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    tile_elements: int | None = None,
) -> Gradients:
    """Gradients for ``x`` (N, I) and ``grad_y`` (N, O), and for every factor the layer has.

        dS = G . W     dA = alpha1 dS B'   dB = alpha1 A' dS   dR = alpha2 rowsum(dS)   dC = alpha2 colsum(dS)
        dW = G . M + G . |W| / weight_scale (not when |W| is detached, or the masks are fixed)
        dU = beta dW V'   dV = beta U' dW

    ``need_weight``: the weight itself is trained (with a fixed mask); its gradient is G . M.
    """
    tile_elements = tile_elements or TILE_ELEMENTS.get(x.device.type, TILE_ELEMENTS["cpu"])
    high = torch.promote_types(x.dtype, torch.float32)
    grads = Gradients()
    for name in ("A", "B", "R", "C", "U", "V"):
        factor = getattr(state.factors, name)
        if factor is not None:
            setattr(grads, name, torch.zeros_like(factor, dtype=high))
    if need_bias:
        grads.bias = grad_y.sum(0, dtype=high)
    if need_weight:
        grads.weight = torch.empty_like(state.weight)
    tiles = [(block, rect) for block in state.layout.blocks() for rect in row_tiles(block.rect, tile_elements)]
    if need_x:  # a sum over tiles is kept wide; a single tile has no sum
        grads.x = torch.zeros_like(x, dtype=high if len(tiles) > 1 else x.dtype)
    for block, rect in tiles:
        _tile_backward(x, grad_y, state, block, rect, grads)
    return grads


def _tile_backward(x: Tensor, grad_y: Tensor, state: LayerState, block: Block, rect: Rect, grads: Gradients) -> None:
    layout = state.layout
    rows, cols = slice(rect.r0, rect.r1), slice(rect.c0, rect.c1)
    tile = tile_factors(state.factors, layout, block, rect)
    out = tile_factors(grads.factors(), layout, block, rect)
    weight = updated_weight(state.weight[rows, cols], tile, state.constants)
    mask = _tile_mask(state, rect)
    needs_scores = state.scores_train and _has_scores(out)
    needs_update = out.update_left is not None or grads.weight is not None
    if needs_update or needs_scores:
        # G of the tile, (h, w), and all that is made of it are in the dtype of x: what autograd would multiply
        left, right = (x[:, rows], grad_y[:, cols]) if layout.transposed else (grad_y[:, rows], x)
        grad = left.t() @ right
        if needs_scores:
            _score_gradients(grad * weight, tile, out, state.constants)
        if needs_update:
            through_mask = apply_mask_(grad.clone(), mask)
            if grads.weight is not None:
                grads.weight[rows, cols] = through_mask
            if needs_scores and not state.constants.detach_magnitude:
                through_mask.addcmul_(grad, weight.abs(), value=1.0 / state.weight_scales[block.part])
            _low_rank_gradients(
                through_mask,
                tile.update_left,
                tile.update_right,
                out.update_left,
                out.update_right,
                state.constants.beta,
            )
    if grads.x is not None:
        merged = apply_mask_(weight, mask)
        if layout.transposed:
            grads.x[:, rows] += grad_y[:, cols] @ merged.t()
        else:
            grads.x += grad_y[:, rows] @ merged


def _tile_mask(state: LayerState, rect: Rect) -> Tensor:
    """Mask of one tile, uint8 0/1 (h, w): whole storage rows are unpacked, and a fused part's columns taken."""
    row_length = state.layout.shape[1]
    mask = unpack_range(state.bits, state.layout.numel, state.num_shards, rect.r0 * row_length, rect.r1 * row_length)
    return mask.view(-1, row_length)[:, rect.c0 : rect.c1]


def _has_scores(tile: TileFactors) -> bool:
    return tile.score_left is not None or tile.score_rows is not None


def _score_gradients(grad: Tensor, tile: TileFactors, out: TileFactors, constants: Constants) -> None:
    _low_rank_gradients(grad, tile.score_left, tile.score_right, out.score_left, out.score_right, constants.alpha1)
    if out.score_rows is not None and out.score_cols is not None:
        out.score_rows.add_(grad.sum(1), alpha=constants.alpha2)
        out.score_cols.add_(grad.sum(0), alpha=constants.alpha2)


def _low_rank_gradients(
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    out_left: Tensor | None,
    out_right: Tensor | None,
    scale: float,
) -> None:
    """out_left += scale grad right',  out_right += scale left' grad."""
    if left is None or right is None or out_left is None or out_right is None:
        return
    out_left.add_(grad @ right.t(), alpha=scale)
    out_right.add_(left.t() @ grad, alpha=scale)
