"""y = x (M . W)' + b and its straight-through gradient, tile by tile (arXiv 2205.11005, section 3; G = dL/d(M . W)).

M . W may be quantised. G is then the gradient at the quantised weight and passes straight through the quantisation, so
the formulas below hold unchanged.

Names: N tokens, O outputs, I inputs. The gradient G, as large as the weight, exists one tile at a time (see
:mod:`pst_ds.core.tiles`). Nothing here keeps a tensor of the size of the weight between the passes.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from pst_ds.core.bits import INT_OF_SIZE, bits_of_range, expand_mask_
from pst_ds.core.coded_weight import CodedWeight, weights_at
from pst_ds.core.factors import Constants, Factors, rows_of_matrix, tile_factors
from pst_ds.core.kernels.triton.merge import MaskBits, Matrices, gradients_into, kernel_mask
from pst_ds.core.layout import Rect, StoredMatrix, WeightLayout, row_tiles
from pst_ds.core.quantization import Rounding
from pst_ds.core.scores import masked_weight, updated_weight
from pst_ds.core.tiles import Tiles, plan_tiles, whole_tile
from pst_ds.core.updates.beside import add_beside_, beside_gradients


@dataclass(frozen=True, slots=True)
class LayerState:
    """The tensors that one layer multiplies with, complete: ZeRO-3 has gathered them."""

    weight: Tensor | CodedWeight
    """W0 in storage shape: (O, I), or (I, O) if transposed."""
    bits: Tensor
    """The mask, see :mod:`pst_ds.core.bits`."""
    num_shards: int
    layout: WeightLayout
    factors: Factors
    constants: Constants
    magnitude_scales: tuple[float, ...]
    """Divisor of |W| in the scores, one per fused matrix."""
    scores_train: bool
    """False once the masks are fixed: scores, and |W| through them, then get no gradient."""
    rounding: Rounding | None = None
    """Quantisation of M . W."""

    def expert(self, expert: int) -> Self:
        """Return one expert of a stack; views, except bits that start within a byte or cross a shard."""
        layout = self.layout
        share = layout.num_matrices // layout.num_experts
        start, stop = layout.expert_range(expert)
        height = layout.expert.shape[0]
        rounding = None
        if self.rounding is not None:
            rounding = self.rounding.of_expert(expert)
        return replace(
            self,
            weight=self.weight[expert * height : (expert + 1) * height],
            bits=bits_of_range(self.bits, layout.numel, self.num_shards, start, stop),
            num_shards=1,
            layout=layout.expert,
            factors=self.factors.of_expert(expert, layout.num_experts),
            magnitude_scales=self.magnitude_scales[expert * share : (expert + 1) * share],
            rounding=rounding,
        )

    def masked_weight(self) -> Tensor:
        """Return M . W in storage shape, quantised if the layer is; see :func:`pst_ds.core.scores.masked_weight`."""
        return masked_weight(
            weight=self.weight,
            bits=self.bits,
            num_shards=self.num_shards,
            layout=self.layout,
            factors=self.factors,
            constants=self.constants,
            rounding=self.rounding,
        )


@dataclass(slots=True)
class Gradients:
    """Gradients of a layer, None where not requested. Those of the factors are fp32 (fp64 for fp64 input)."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    R: Tensor | None = None
    C: Tensor | None = None
    U: Tensor | None = None
    V: Tensor | None = None
    update: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of the parameters of an update form without kernels, by name."""

    def factors(self) -> Factors:
        """Return the gradients of the factors."""
        return Factors(A=self.A, B=self.B, R=self.R, C=self.C, U=self.U, V=self.V, update=self.update)

    def of_parameter(self, name: str) -> Tensor | None:
        """Return the gradient of a layer's trained parameter, of the scores or of the update."""
        if name in self.update:
            return self.update[name]
        gradient: Tensor | None = getattr(self, name)
        return gradient


def forward(x: Tensor, bias: Tensor | None, state: LayerState) -> Tensor:
    """Return y = x (M . W)' + bias, (..., O), for ``x`` (..., I), plus beta (x V') U' of an update next to the mask."""
    merged = state.masked_weight()
    if state.layout.transposed:
        merged = merged.t()
    y = torch.nn.functional.linear(x, merged, bias)
    left = state.factors.beside_U
    right = state.factors.beside_V
    if left is not None and right is not None:
        x_rows = x.reshape(-1, x.shape[-1])  # (N, I)
        y_rows = y.view(-1, y.shape[-1])  # (N, O)
        add_beside_(y_rows, x_rows, left, right, state.layout, state.constants.beta)
    return y


def forward_into(out: Tensor, x: Tensor, state: LayerState) -> None:
    """Write x (M . W)' to ``out`` (N, O), for ``x`` (N, I)."""
    merged = state.masked_weight()
    if not state.layout.transposed:
        merged = merged.t()
    torch.mm(x, merged, out=out)  # (N, I) by (I, O)


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
    """Return the gradients for ``x`` (N, I) and ``grad_y`` (N, O), and for every factor of the layer.

        dS = G . W     dA = alpha1 dS B'   dB = alpha1 A' dS   dR = alpha2 rowsum(dS)   dC = alpha2 colsum(dS)
        dW = G . M + G . |W| / weight_scale (not if |W0| is in the scores, or the masks are fixed)
        dU = beta dW V'   dV = beta U' dW, or those of :func:`beside_gradients`

    ``need_weight``: return the gradient of the weight, G . M. ``tile_bytes``: budget of :mod:`pst_ds.core.tiles`; 0 is
    the device's default. Raises TileBudgetError.
    """
    if state.factors.update and not state.constants.form.exact_in_slices:
        tiles = whole_tile(state.layout)
    else:
        tiles = plan_tiles(state.layout, x.element_size(), tile_bytes, device_type=x.device.type)
    x = x.contiguous()
    grad_y = grad_y.contiguous()
    # Sums over tokens and tiles are at least fp32, also for 16-bit inputs.
    high = torch.promote_types(x.dtype, torch.float32)
    factors = state.factors.of_update()
    if state.scores_train:
        factors = factors_with_ones(state)
    sums = _zero_sums(factors, high)
    grads = Gradients()
    if need_bias:
        grads.bias = grad_y.sum(0, dtype=high)
    if need_weight:
        grads.weight = torch.empty(state.layout.shape, dtype=state.weight.dtype, device=state.weight.device)
    if need_x and tiles.cut_outputs:
        # dX is then a sum over tiles, which is accumulated in the wider dtype.
        grads.x = torch.zeros_like(x, dtype=high)
    elif need_x:
        grads.x = torch.empty_like(x)
    mask = None
    if not need_weight:  # the kernels do not write G . M, the gradient of the weight
        mask = mask_for_kernels(x, state)
    work = _Work(x=x, grad_y=grad_y, state=state, factors=factors, sums=sums, grads=grads, tiles=tiles, mask_bits=mask)
    for rect in tiles.rects:
        _tile_backward(work, rect)
    finish_factors(sums, state, grads)
    left = state.factors.beside_U
    right = state.factors.beside_V
    if left is not None and right is not None:
        grads.U, grads.V = beside_gradients(x, grad_y, left, right, state.layout, state.constants.beta, grad_x=grads.x)
    return grads


def _zero_sums(factors: Factors, dtype: torch.dtype) -> Factors:
    """Return zeros in the shapes of A, B, U, V and the parameters of the update form."""
    zeros: dict[str, Any] = {}
    for name in "ABUV":  # the gradients of R and C are columns of A's and rows of B's
        factor = getattr(factors, name)
        if factor is not None:
            zeros[name] = torch.zeros_like(factor, dtype=dtype)
    update = {name: torch.zeros_like(value, dtype=dtype) for name, value in factors.update.items()}
    return Factors(**zeros, update=update)


def mask_for_kernels(x: Tensor, state: LayerState) -> MaskBits | None:
    """Return the mask for the kernels of the backward pass, or None if they do not support the layer."""
    if x.dtype != state.weight.dtype or state.factors.update:
        return None
    return kernel_mask(state.weight, state.bits, state.layout.shape, state.num_shards)


@dataclass
class _Work:
    """Tensors that every tile of a layer reads and accumulates into, and memory for one tile."""

    x: Tensor
    grad_y: Tensor
    state: LayerState
    factors: Factors
    """With a column of ones, see :func:`factors_with_ones`. Without A and B if scores do not train."""
    sums: Factors
    grads: Gradients
    tiles: Tiles
    mask_bits: MaskBits | None
    """Set if GPU kernels compute the layer."""

    def __post_init__(self) -> None:
        # Allocated once for all tiles, of which the largest needs all of it.
        tile = self.tiles.max_numel
        band = self.tiles.max_band_numel
        self.weight = self.x.new_empty(tile)
        self.grad = self.x.new_empty(tile)
        self.product = self.x.new_empty(band)
        self.magnitude = self.x.new_empty(band)
        # Integers of the size of a weight, so that a mask is applied by "and".
        self.mask = self.x.new_empty(band, dtype=INT_OF_SIZE[self.x.element_size()])


def _tile_backward(work: _Work, rect: Rect) -> None:
    """Add the terms of a tile to all gradients of the layer."""
    layout = work.state.layout
    rows, cols = rect.slices
    outputs = rows
    inputs = cols
    if layout.transposed:
        outputs = cols
        inputs = rows
    x = work.x[:, inputs]
    grad_y = work.grad_y[:, outputs]
    weight = _shaped(work.weight, rect)
    grad = _shaped(work.grad, rect)
    sums = work.sums
    needs_grad = sums.A is not None or sums.U is not None or bool(sums.update) or work.grads.weight is not None
    if needs_grad:
        # G and everything derived from it have the dtype of x, as in autograd.
        if layout.transposed:
            torch.mm(x.t(), grad_y, out=grad)
        else:
            torch.mm(grad_y.t(), x, out=grad)
    for matrix in layout.matrices():
        part = rect.meet(matrix.rect)
        if part is None:
            continue
        band_gradients = _band_by_kernel
        if work.mask_bits is None:
            band_gradients = _band_backward
            # The kernel computes W itself, from W0.
            state = work.state
            merged = weight[part.inside(rect)]
            factors = tile_factors(state.factors, layout, matrix, part)
            updated_weight(weights_at(state.weight, part, merged), factors, state.constants, out=merged)
        for band in row_tiles(part, work.tiles.band_elements):
            here = band.inside(rect)
            band_gradients(work=work, matrix=matrix, rect=band, weight=weight[here], grad=grad[here])
            if work.state.rounding is not None:
                work.state.rounding.round_(weight[here], band)
    if work.grads.x is not None:
        # By now the buffer has M . W.
        merged = weight
        if layout.transposed:
            merged = weight.t()
        _input_gradient(work, grad_y, merged, inputs)


def _shaped(buffer: Tensor, rect: Rect) -> Tensor:
    """Return the beginning of a flat buffer in the shape of ``rect``."""
    return buffer[: rect.numel].view(rect.shape)


def _band_backward(work: _Work, matrix: StoredMatrix, rect: Rect, weight: Tensor, grad: Tensor) -> None:
    """Turn G and W of a band into gradients. W becomes M . W."""
    state = work.state
    rows, cols = rect.slices
    mask = _shaped(work.mask, rect)
    expand_mask_(mask, state.bits, state.layout.shape, state.num_shards, rows, cols)
    product = _shaped(work.product, rect)
    factors = tile_factors(work.factors, state.layout, matrix, rect)
    sums = tile_factors(work.sums, state.layout, matrix, rect)
    if work.sums.A is not None:
        torch.mul(grad, weight, out=product)  # dS
        _add_low_rank_gradients(product, factors.score_left, factors.score_right, sums.score_left, sums.score_right)
    if work.sums.U is not None or work.sums.update or work.grads.weight is not None:
        _and(grad, mask, out=product)  # dW
        if work.grads.weight is not None:
            work.grads.weight[rows, cols] = product
        if work.sums.A is not None and not state.constants.frozen_magnitude:
            magnitude = torch.abs(weight, out=_shaped(work.magnitude, rect))
            if factors.row_norms is not None:
                magnitude.mul_(factors.row_norms.unsqueeze(1))
            if factors.col_norms is not None:
                magnitude.mul_(factors.col_norms)
            product.addcmul_(grad, magnitude, value=1.0 / state.magnitude_scales[matrix.index])
        _add_low_rank_gradients(product, factors.update_left, factors.update_right, sums.update_left, sums.update_right)
        _add_form_gradients(work, matrix, rect, product)
    _and(weight, mask, out=weight)


def _add_form_gradients(work: _Work, matrix: StoredMatrix, rect: Rect, weight_gradient: Tensor) -> None:
    """Add a band's terms of the gradients of an update form without kernels. ``weight_gradient``: dW of the band."""
    state = work.state
    update = tile_factors(state.factors, state.layout, matrix, rect).update
    if update is None:
        return
    # The buffer of the tile holds W by now, and forms differentiate at W0.
    base = weights_at(state.weight, rect, work.x.new_empty(rect.shape))
    for name, term in update.gradients(base, weight_gradient, state.constants).items():
        rows_of_matrix(work.sums.update[name], matrix, state.layout).add_(term)


def _band_by_kernel(work: _Work, matrix: StoredMatrix, rect: Rect, weight: Tensor, grad: Tensor) -> None:
    """Do the same as :func:`_band_backward`, from W0, in one launch and the products with the factors."""
    state = work.state
    constants = state.constants
    assert work.mask_bits is not None
    assert isinstance(state.weight, Tensor)
    # The kernel writes what the products with the factors read, dS and dW, into the buffers that the other path uses.
    scores = None
    factor = 0.0  # |W| has no gradient
    if work.sums.A is not None:
        scores = _shaped(work.product, rect)
        if not constants.frozen_magnitude:
            factor = 1.0 / state.magnitude_scales[matrix.index]
    updates = None
    if work.sums.U is not None:
        updates = _shaped(work.magnitude, rect)
    gradients_into(
        merged=weight,
        scores=scores,
        updates=updates,
        weight=state.weight[rect.slices],
        grad=grad,
        mask=work.mask_bits,
        matrices=Matrices.of_rect(rect, state.layout.shape[1]),
        tile=tile_factors(state.factors, state.layout, matrix, rect),
        constants=constants,
        factor=factor,
    )
    factors = tile_factors(work.factors, state.layout, matrix, rect)
    sums = tile_factors(work.sums, state.layout, matrix, rect)
    if scores is not None:
        _add_low_rank_gradients(scores, factors.score_left, factors.score_right, sums.score_left, sums.score_right)
    if updates is not None:
        _add_low_rank_gradients(updates, factors.update_left, factors.update_right, sums.update_left, sums.update_right)


def _input_gradient(work: _Work, grad_y: Tensor, merged: Tensor, inputs: slice) -> None:
    """Compute dX of a tile's inputs, or its term of the sum over tiles. ``merged``: M . W, (outputs, inputs)."""
    grad_x = work.grads.x
    assert grad_x is not None
    if not work.tiles.cut_outputs:
        torch.mm(grad_y, merged, out=grad_x[:, inputs])
    elif grad_x.dtype == merged.dtype:
        # A tile with some outputs has all inputs, and adds a term to all of dX.
        grad_x.addmm_(grad_y, merged)
    else:
        grad_x += grad_y @ merged


def _and(values: Tensor, mask: Tensor, out: Tensor) -> None:
    """Write ``values`` to ``out`` where the mask keeps a weight, and +0.0 elsewhere."""
    torch.bitwise_and(values.view(mask.dtype), mask, out=out.view(mask.dtype))


def factors_with_ones(state: LayerState) -> Factors:
    """Return the factors with A and B of rank k + 1: the gradients of [A | 1] and [B; 1] contain dR and dC.

    dS is thus read twice instead of four times. Without R and C, A and B stay unchanged. On a GPU, zeros follow up to a
    multiple of eight: cuBLAS is several times slower with rows that are not aligned to 16 bytes.
    """
    factors = state.factors
    num_matrices = state.layout.num_matrices
    A = factors.A
    B = factors.B
    if factors.R is not None and factors.C is not None:
        rank = _rank(A)
        num_extra = 1
        if factors.R.device.type != "cpu":
            num_extra += -(rank + 1) % 8
        # A one and zeros; no number is read by the host.
        extra = factors.R.new_zeros(num_extra)
        extra[:1].fill_(1)
        left = [extra.expand(factors.R.shape[0], -1)]
        right = [extra.unsqueeze(1).expand(num_matrices, -1, factors.C.shape[1])]
        if A is not None and B is not None:
            left.insert(0, A)
            right.insert(0, B.view(num_matrices, rank, -1))
        A = torch.cat(left, 1)
        B = torch.cat(right, 1).flatten(0, 1)
    return Factors(A=A, B=B, U=factors.U, V=factors.V, norms=factors.norms, update=factors.update)


def _rank(A: Tensor | None) -> int:
    """Return the score rank; 0 without A and B."""
    return 0 if A is None else A.shape[1]


def finish_factors(sums: Factors, state: LayerState, grads: Gradients) -> None:
    """Set the gradients of the factors from the sums over tiles. They are zero for scores that do not train."""
    factors = state.factors
    constants = state.constants
    if sums.U is not None and sums.V is not None:
        grads.U = sums.U * constants.beta
        grads.V = sums.V * constants.beta
    grads.update = dict(sums.update)
    if sums.A is None or sums.B is None:
        for name in "ABRC":
            factor = getattr(factors, name)
            if factor is not None:
                high = torch.promote_types(factor.dtype, torch.float32)
                setattr(grads, name, torch.zeros_like(factor, dtype=high))
        return
    # The column behind those of A, and the row behind those of B, are the ones.
    rank = _rank(factors.A)
    by_matrix = sums.B.view(state.layout.num_matrices, -1, sums.B.shape[1])
    if factors.A is not None:
        grads.A = sums.A[:, :rank] * constants.alpha1
        grads.B = by_matrix[:, :rank].flatten(0, 1) * constants.alpha1
    if factors.R is not None:
        grads.R = sums.A[:, rank] * constants.alpha2
        grads.C = by_matrix[:, rank] * constants.alpha2


def _add_low_rank_gradients(
    grad: Tensor, left: Tensor | None, right: Tensor | None, sum_left: Tensor | None, sum_right: Tensor | None
) -> None:
    """Compute sum_left += grad right' and sum_right += left' grad."""
    if left is None or right is None or sum_left is None or sum_right is None:
        return
    sum_left += grad @ right.t()
    sum_right += left.t() @ grad
