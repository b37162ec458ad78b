"""Statistics of a layer: correlation of scores with |W|, norms.

Sums over weights add up over parts of a matrix, so every rank computes its own part. Norms of products are
computed from the small matrices only.
"""

import math
from ctypes import c_double
from functools import cache, partial

import torch
from torch import Tensor

from pst_ds.core.bits import NATIVE_DTYPES
from pst_ds.core.factors import Constants, Factors, TileFactors, tile_factors
from pst_ds.core.kernels import INT, TENSOR, NativeSource, load
from pst_ds.core.keys import scores_of_keys
from pst_ds.core.layout import WeightLayout

_LEAST_VARIANCE = 1e-12
"""Relative to the mean square. A smaller variance is rounding error of the sums."""
SOURCE = NativeSource(
    "sums.cpp",
    {"pst_moments": ([TENSOR, TENSOR, INT, TENSOR], None), "pst_squares": ([TENSOR, *([INT] * 4)], c_double)},
    "figures of layers",
)
library = cache(partial(load, SOURCE))


def score_moments(keys: Tensor, weights: Tensor, weight_scale: float) -> Tensor:
    """Return :func:`moment_sums` of the scores with ``keys`` (int32) and of |weights| / ``weight_scale``."""
    native = None
    if keys.device.type == "cpu":
        native = library()
    if native is None:
        sums = moment_sums(scores_of_keys(keys), weights.abs())
    else:
        keys = keys.contiguous()
        weights = weights.contiguous()
        sums = torch.empty(5, dtype=torch.float64)
        native.pst_moments(keys, weights, keys.numel(), sums)
    inverse = 1.0 / weight_scale
    # The sums of y, y**2 and x y. By Python numbers: a tensor made of them would make the host wait.
    for place, factor in ((1, inverse), (3, inverse * inverse), (4, inverse)):
        sums[place].mul_(factor)
    return sums


def square_sum(values: Tensor) -> Tensor:
    """Return the sum of the squares of (rows, cols) ``values``, a float64 scalar on their device."""
    native = None
    if values.device.type == "cpu":
        native = library()
    if native is None or values.dtype not in NATIVE_DTYPES or values.stride(1) != 1:
        flat = values.float().flatten().double()
        return flat @ flat
    squares = native.pst_squares(values, NATIVE_DTYPES[values.dtype], values.stride(0), *values.shape)
    return torch.tensor(squares, dtype=torch.float64)


def moment_sums(x: Tensor, y: Tensor) -> Tensor:
    """Return the sums of x, y, x**2, y**2 and x y over two tensors of one shape: (5,) float64."""
    x = x.flatten().double()
    y = y.flatten().double()
    return torch.stack([x.sum(), y.sum(), x @ x, y @ y, x @ y])


def correlation(sums: Tensor, count: int) -> float | None:
    """Return Pearson's correlation of x and y, in [-1, 1], from :func:`moment_sums` over ``count`` pairs.

    None if one of them does not vary or is not finite.
    """
    x, y, xx, yy, xy = (sums.double() / count).tolist()
    variance_x = xx - x * x
    variance_y = yy - y * y
    # Written so that NaN, of which every comparison is false, gives None.
    if not (variance_x > _LEAST_VARIANCE * xx and variance_y > _LEAST_VARIANCE * yy):
        return None
    pearson: float = (xy - x * y) / math.sqrt(variance_x * variance_y)
    if not math.isfinite(pearson):
        return None
    return max(-1.0, min(1.0, pearson))  # rounding may exceed 1


def product_norm(left: Tensor, right: Tensor) -> Tensor:
    """Return the Frobenius norm of left @ right, (O, k) and (k, I), from their (k, k) Gram matrices: a float64 scalar.

    |L R|^2 = trace(R' L' L R) = sum of (L' L) . (R R')
    """
    left = left.double()
    right = right.double()
    squared = ((left.t() @ left) * (right @ right.t())).sum()
    # Terms of both signs cancel, so the sum of a zero product may be slightly negative.
    return squared.clamp(min=0.0).sqrt()


def update_norm(layout: WeightLayout, factors: Factors, constants: Constants) -> Tensor:
    """Return the norm of beta U V of a layer, a float64 scalar; 0 without U and V."""
    norms: list[Tensor] = []
    if factors.beside_U is not None:
        factors = Factors(U=factors.beside_U, V=factors.beside_V)
    for tile in _matrices(layout, factors):
        if tile.update_left is not None and tile.update_right is not None:
            norms.append(product_norm(tile.update_left, tile.update_right))
    return abs(constants.beta) * _norm_of_all(norms)


def learned_score_norm(layout: WeightLayout, factors: Factors, constants: Constants) -> Tensor:
    """Return the norm of alpha1 A B + alpha2 (R 1' + 1 C') of a layer, a float64 scalar; 0 without these factors.

    The sum is one product, of [alpha1 A | alpha2 R | alpha2 1] and [B; 1'; C].
    """
    norms: list[Tensor] = []
    for tile in _matrices(layout, factors):
        left: list[Tensor] = []
        right: list[Tensor] = []
        if tile.score_left is not None and tile.score_right is not None:
            left.append(constants.alpha1 * tile.score_left.double())
            right.append(tile.score_right.double())
        if tile.score_rows is not None and tile.score_cols is not None:
            rows = tile.score_rows.double()
            cols = tile.score_cols.double()
            left.append(constants.alpha2 * torch.stack([rows, torch.ones_like(rows)], 1))
            right.append(torch.stack([torch.ones_like(cols), cols]))
        if left:
            norms.append(product_norm(torch.cat(left, 1), torch.cat(right)))
    return _norm_of_all(norms)


def _norm_of_all(norms: list[Tensor]) -> Tensor:
    """Return the norm of several matrices together from the norm of each."""
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _matrices(layout: WeightLayout, factors: Factors) -> list[TileFactors]:
    """Return the factors of each matrix of a layer."""
    return [tile_factors(factors, layout, matrix, matrix.rect) for matrix in layout.matrices()]
