"""y = x (M . W)' + b and its straight-through gradient, tile by tile (arXiv 2205.11005, section 3; G = dL/d(M . W)).

Names: N tokens, O outputs, I inputs. The gradient G, as large as the weight, exists one tile at a time, see
:mod:`pst_ds.core.tiles`; nothing here keeps a tensor of the weight's size for later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pst_ds.core.bits import INT_OF_SIZE, expand_mask_
from pst_ds.core.factors import Constants, Factors, tile_factors
from pst_ds.core.layout import Block, Rect, WeightLayout
from pst_ds.core.scores import masked_weight, updated_weight
from pst_ds.core.tiles import Tiles, plan_tiles


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
    tile_bytes: int = 0,
) -> Gradients:
    """Gradients for ``x`` (N, I) and ``grad_y`` (N, O), and for every factor the layer has.

        dS = G . W     dA = alpha1 dS B'   dB = alpha1 A' dS   dR = alpha2 rowsum(dS)   dC = alpha2 colsum(dS)
        dW = G . M + G . |W| / weight_scale (not when |W| is detached, or the masks are fixed)
        dU = beta dW V'   dV = beta U' dW

    ``need_weight``: the weight itself is trained (with a fixed mask); its gradient is G . M.
    ``tile_bytes``: budget of :mod:`pst_ds.core.tiles`; 0 is the device's default. Raises TileBudgetError.
    """
    tiles = plan_tiles(state.layout, x.element_size(), tile_bytes, device_type=x.device.type)
    x, grad_y = x.contiguous(), grad_y.contiguous()
    high = torch.promote_types(x.dtype, torch.float32)
    factors = _with_ones(state) if state.scores_train else Factors(U=state.factors.U, V=state.factors.V)
    sums = Factors(**{n: torch.zeros_like(f, dtype=high) for n in "ABUV" if (f := getattr(factors, n)) is not None})
    grads = Gradients()
    if need_bias:
        grads.bias = grad_y.sum(0, dtype=high)
    if need_weight:
        grads.weight = torch.empty_like(state.weight)
    if need_x:  # a sum over tiles is kept wide
        grads.x = torch.zeros_like(x, dtype=high) if tiles.cut_outputs else torch.empty_like(x)
    work = _Work(x, grad_y, state, factors, sums, grads, tiles, _Buffers.of(x, tiles))
    for rect in tiles.rects:
        _tile_backward(work, rect)
    _finish_factors(sums, state, grads)
    return grads


@dataclass(frozen=True, slots=True)
class _Buffers:
    """The four buffers of a tile, flat; see :mod:`pst_ds.core.tiles`."""

    weight: Tensor
    grad: Tensor
    product: Tensor
    mask: Tensor

    @classmethod
    def of(cls, like: Tensor, tiles: Tiles) -> _Buffers:
        size, integer = tiles.max_numel, INT_OF_SIZE[like.element_size()]
        return cls(
            like.new_empty(size), like.new_empty(size), like.new_empty(size), like.new_empty(size, dtype=integer)
        )

    def shaped(self, rect: Rect) -> _Buffers:
        def view(flat: Tensor) -> Tensor:
            return flat[: rect.numel].view(rect.r1 - rect.r0, rect.c1 - rect.c0)

        return _Buffers(view(self.weight), view(self.grad), view(self.product), view(self.mask))


@dataclass(frozen=True, slots=True)
class _Work:
    """What every tile of a layer reads, and adds to."""

    x: Tensor
    grad_y: Tensor
    state: LayerState
    factors: Factors
    """With ones, see :func:`_with_ones`; without A and B when scores do not train."""
    sums: Factors
    grads: Gradients
    tiles: Tiles
    buffers: _Buffers


def _tile_backward(work: _Work, rect: Rect) -> None:
    """The steps in the order in which they use the buffers of the tile."""
    tile = _Tile.of(work, rect)
    needs_scores = work.sums.A is not None
    needs_update = work.sums.U is not None or work.grads.weight is not None
    _merge(work, tile)
    if needs_scores or needs_update:
        _weight_gradient(work, tile)
    if needs_scores:
        _add_score_gradients(work, tile)
    if work.grads.x is not None:
        _input_gradient(work, tile)
    if needs_update:
        _add_update_gradients(work, tile, through_magnitude=needs_scores and not work.state.constants.detach_magnitude)


@dataclass(frozen=True, slots=True)
class _Tile:
    """A rectangle of the stored weight, and the buffers for it, (rows, cols)."""

    rows: slice
    cols: slice
    x: Tensor
    """(N, inputs of the tile)"""
    grad_y: Tensor
    """(N, outputs of the tile)"""
    pieces: tuple[tuple[Block, Rect, tuple[slice, slice]], ...]
    """(matrix, its part of the tile, the same counted from the tile's corner) of every fused matrix in the tile."""
    buffers: _Buffers

    @classmethod
    def of(cls, work: _Work, rect: Rect) -> _Tile:
        layout = work.state.layout
        rows, cols = slice(rect.r0, rect.r1), slice(rect.c0, rect.c1)
        outputs, inputs = (cols, rows) if layout.transposed else (rows, cols)
        x, grad_y = work.x[:, inputs], work.grad_y[:, outputs]
        return cls(rows, cols, x, grad_y, tuple(_pieces(layout, rect)), work.buffers.shaped(rect))


def _pieces(layout: WeightLayout, rect: Rect) -> Iterator[tuple[Block, Rect, tuple[slice, slice]]]:
    """(matrix, its part of ``rect``, the same within the tile) of every fused matrix that ``rect`` meets."""
    for block in layout.blocks():
        own = Rect(
            max(rect.r0, block.rect.r0),
            min(rect.r1, block.rect.r1),
            max(rect.c0, block.rect.c0),
            min(rect.c1, block.rect.c1),
        )
        if own.r0 < own.r1 and own.c0 < own.c1:
            rows = slice(own.r0 - rect.r0, own.r1 - rect.r0)
            yield block, own, (rows, slice(own.c0 - rect.c0, own.c1 - rect.c0))


def _merge(work: _Work, tile: _Tile) -> None:
    """W and M."""
    state, layout = work.state, work.state.layout
    for block, own, here in tile.pieces:
        weight, factors = (
            state.weight[own.r0 : own.r1, own.c0 : own.c1],
            tile_factors(state.factors, layout, block, own),
        )
        updated_weight(weight, factors, state.constants, out=tile.buffers.weight[here])
    expand_mask_(tile.buffers.mask, state.bits, layout.shape, state.num_shards, tile.rows, tile.cols)


def _weight_gradient(work: _Work, tile: _Tile) -> None:
    """G. It, and all that is made of it, are in the dtype of x: what autograd would multiply."""
    left, right = (tile.x, tile.grad_y) if work.state.layout.transposed else (tile.grad_y, tile.x)
    torch.mm(left.t(), right, out=tile.buffers.grad)


def _add_score_gradients(work: _Work, tile: _Tile) -> None:
    """P = G . W = dS, times the factors of the scores."""
    torch.mul(tile.buffers.grad, tile.buffers.weight, out=tile.buffers.product)
    for block, own, here in tile.pieces:
        factors, sums = (tile_factors(f, work.state.layout, block, own) for f in (work.factors, work.sums))
        _add_low_rank_gradients(
            tile.buffers.product[here], factors.score_left, factors.score_right, sums.score_left, sums.score_right
        )


def _input_gradient(work: _Work, tile: _Tile) -> None:
    """P = M . W; dX of the tile's inputs, or its share of the sum over tiles."""
    _and(tile.buffers.weight, tile.buffers.mask, out=tile.buffers.product)
    transposed, grad_x = work.state.layout.transposed, work.grads.x
    assert grad_x is not None
    merged = tile.buffers.product.t() if transposed else tile.buffers.product
    if not work.tiles.cut_outputs:
        torch.mm(tile.grad_y, merged, out=grad_x[:, tile.rows if transposed else tile.cols])
    elif grad_x.dtype == merged.dtype:
        grad_x.addmm_(tile.grad_y, merged)
    else:
        grad_x += tile.grad_y @ merged


def _add_update_gradients(work: _Work, tile: _Tile, *, through_magnitude: bool) -> None:
    """P = dW = G . M + G . |W| / scale, times U and V; W becomes |W|."""
    weight, grad, product = tile.buffers.weight, tile.buffers.grad, tile.buffers.product
    _and(grad, tile.buffers.mask, out=product)
    if work.grads.weight is not None:
        work.grads.weight[tile.rows, tile.cols] = product
    if through_magnitude:
        weight.abs_()
    for block, own, here in tile.pieces:
        if through_magnitude:
            product[here].addcmul_(grad[here], weight[here], value=1.0 / work.state.weight_scales[block.part])
        factors, sums = (tile_factors(f, work.state.layout, block, own) for f in (work.factors, work.sums))
        _add_low_rank_gradients(
            product[here], factors.update_left, factors.update_right, sums.update_left, sums.update_right
        )


def _and(values: Tensor, mask: Tensor, out: Tensor) -> None:
    """out = values where the mask keeps, +0.0 elsewhere."""
    torch.bitwise_and(values.view(mask.dtype), mask, out=out.view(mask.dtype))


def _with_ones(state: LayerState) -> Factors:
    """U, V, and A, B of rank k + 1: the gradients of [A | 1] and [B; 1] have dR and dC as their last row or column.

    So dS is read twice, not four times. Without R and C, A and B are as they are.
    """
    own, parts = state.factors, state.layout.parts
    A, B = own.A, own.B
    if own.R is not None and own.C is not None:
        ones_left, ones_right = torch.ones_like(own.R).unsqueeze(1), torch.ones_like(own.C).unsqueeze(1)
        A = ones_left if A is None else torch.cat([A, ones_left], 1)
        B = ones_right if B is None else torch.cat([B.view(parts, -1, B.shape[1]), ones_right], 1)
        B = B.flatten(0, 1)
    return Factors(A=A, B=B, U=own.U, V=own.V)


def _finish_factors(sums: Factors, state: LayerState, grads: Gradients) -> None:
    """Gradients of the factors from the sums over tiles; zero for scores that do not train."""
    own, constants = state.factors, state.constants
    if sums.U is not None and sums.V is not None:
        grads.U, grads.V = sums.U * constants.beta, sums.V * constants.beta
    if sums.A is None or sums.B is None:
        for name in "ABRC":
            factor = getattr(own, name)
            if factor is not None:
                setattr(grads, name, torch.zeros_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32)))
        return
    rank = 0 if own.A is None else own.A.shape[1]
    by_part = sums.B.view(state.layout.parts, -1, sums.B.shape[1])
    if own.A is not None:
        grads.A = sums.A[:, :rank] * constants.alpha1
        grads.B = by_part[:, :rank].flatten(0, 1) * constants.alpha1
    if own.R is not None:
        grads.R = sums.A[:, rank] * constants.alpha2
        grads.C = by_part[:, rank] * constants.alpha2


def _add_low_rank_gradients(
    grad: Tensor, left: Tensor | None, right: Tensor | None, sum_left: Tensor | None, sum_right: Tensor | None
) -> None:
    """sum_left += grad right',  sum_right += left' grad."""
    if left is None or right is None or sum_left is None or sum_right is None:
        return
    sum_left += grad @ right.t()
    sum_right += left.t() @ grad
