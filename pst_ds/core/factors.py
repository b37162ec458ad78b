"""The small matrices of one PST layer, and their views for a rectangle of its stored weight.

Shapes, for O outputs, I inputs, P fused parts, score rank k and update rank r:

    A (O, k)    B (P*k, I)    R (O,)    C (P, I)    U (O, r)    V (P*r, I)

Each output row belongs to exactly one part, so A, R and U are shared by stacking, while B, C and V hold one set a
part. For an ordinary layer P = 1 and these are the matrices of the paper (arXiv 2205.11005, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pst_ds.core.layout import Block, Rect, WeightLayout


@dataclass(frozen=True, slots=True)
class Constants:
    """The numbers of the score and of the update.

    S = |W| / weight_scale + alpha1 A B + alpha2 (R 1' + 1 C'),  W = W0 + beta U V
    """

    alpha1: float = 1.0
    alpha2: float = 1.0
    beta: float = 1.0
    detach_magnitude: bool = False
    """True drops the path of the gradient through |W| in S."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors a layer has; None for those it was built without. See the module's docstring for shapes."""

    A: Tensor | None = None
    B: Tensor | None = None
    R: Tensor | None = None
    C: Tensor | None = None
    U: Tensor | None = None
    V: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TileFactors:
    """Factors of one rectangle of the *stored* weight, (rows, cols): products are left @ right."""

    score_left: Tensor | None
    """(rows, k)"""
    score_right: Tensor | None
    """(k, cols)"""
    score_rows: Tensor | None
    """(rows,)"""
    score_cols: Tensor | None
    """(cols,)"""
    update_left: Tensor | None
    """(rows, r)"""
    update_right: Tensor | None
    """(r, cols)"""


def tile_factors(factors: Factors, layout: WeightLayout, block: Block, rect: Rect) -> TileFactors:
    """Views of the factors that make the scores and the update of ``rect``, which lies inside ``block``."""
    rows, cols = slice(rect.r0, rect.r1), slice(rect.c0, rect.c1)
    outputs, inputs = (cols, rows) if layout.transposed else (rows, cols)

    def pair(by_output: Tensor | None, by_input: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if by_output is None or by_input is None:
            return None, None
        rank = by_output.shape[1]
        outer = by_output[outputs]
        inner = by_input[block.part * rank : (block.part + 1) * rank, inputs]
        return (inner.t(), outer.t()) if layout.transposed else (outer, inner)

    score_left, score_right = pair(factors.A, factors.B)
    update_left, update_right = pair(factors.U, factors.V)
    by_output = factors.R[outputs] if factors.R is not None else None
    by_input = factors.C[block.part, inputs] if factors.C is not None else None
    score_rows, score_cols = (by_input, by_output) if layout.transposed else (by_output, by_input)
    return TileFactors(score_left, score_right, score_rows, score_cols, update_left, update_right)
