"""The small matrices of one PST layer, and their views for a rectangle of its stored weight.

Shapes, for O outputs, I inputs, P fused matrices, score rank k and update rank r:

    A (O, k)    B (P*k, I)    R (O,)    C (P, I)    U (O, r)    V (P*r, I)

Each output row belongs to exactly one part, so A, R and U stack the parts, while B, C and V have one set per part. For
an ordinary layer P = 1, and these are the matrices of the paper (arXiv 2205.11005, section 3). In a stack of experts, O
and P count all experts, so every factor is in expert order.

"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pst_ds.core.layout import Rect, StoredMatrix, WeightLayout


@dataclass(frozen=True, slots=True)
class Constants:
    """The constants of the score and of the update.

    S = |W| / weight_scale + alpha1 A B + alpha2 (R 1' + 1 C'),  W = W0 + beta U V
    |W| is |W| . 1 n' where the inputs have norms n.
    """

    alpha1: float = 1.0
    alpha2: float = 1.0
    beta: float = 1.0
    frozen_magnitude: bool = False
    """True if S uses |W0|, which the update does not change and which passes no gradient, instead of |W|."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of a layer, None for those that it was built without. The module's docstring has the shapes."""

    A: Tensor | None = None
    B: Tensor | None = None
    R: Tensor | None = None
    C: Tensor | None = None
    U: Tensor | None = None
    V: Tensor | None = None
    norms: Tensor | None = None
    """(I,) fp32, or (E*I,) for a stack of experts: norm of each input relative to their mean. Not trained."""

    def of_expert(self, expert: int, num_experts: int) -> "Factors":
        """Return views of the factors of one of ``num_experts`` experts."""
        found = {}
        for name, value in self.held().items():
            share = value.shape[0] // num_experts
            found[name] = value[expert * share : (expert + 1) * share]
        return Factors(**found)

    def held(self) -> dict[str, Tensor]:
        """Return the factors that are not None, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def to(self, device: torch.device) -> "Factors":
        """Return the factors on ``device``."""
        return Factors(**{name: value.to(device) for name, value in self.held().items()})


@dataclass(frozen=True, slots=True)
class TileFactors:
    """Factors of one rectangle of the *stored* weight, (rows, cols): products are left @ right."""

    score_left: Tensor | None = None
    """(rows, k)"""
    score_right: Tensor | None = None
    """(k, cols)"""
    score_rows: Tensor | None = None
    """(rows,)"""
    score_cols: Tensor | None = None
    """(cols,)"""
    update_left: Tensor | None = None
    """(rows, r)"""
    update_right: Tensor | None = None
    """(r, cols)"""
    row_norms: Tensor | None = None
    """(rows,), for a weight stored as (I, O)"""
    col_norms: Tensor | None = None
    """(cols,), for a weight stored as (O, I)"""

    def held(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


def tile_factors(factors: Factors, layout: WeightLayout, matrix: StoredMatrix, rect: Rect) -> TileFactors:
    """Return views of the factors that compute the scores and the update of ``rect``, which lies inside ``matrix``."""
    outputs, inputs = matrix.ranges(rect, transposed=layout.transposed)

    def pair(by_output: Tensor | None, by_input: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if by_output is None or by_input is None:
            return None, None
        rank = by_output.shape[1]
        outer = by_output[matrix.outputs][outputs]
        inner = by_input[matrix.index * rank : (matrix.index + 1) * rank, inputs]
        return (inner.t(), outer.t()) if layout.transposed else (outer, inner)

    score_left, score_right = pair(factors.A, factors.B)
    update_left, update_right = pair(factors.U, factors.V)
    by_output = factors.R[matrix.outputs][outputs] if factors.R is not None else None
    by_input = factors.C[matrix.index, inputs] if factors.C is not None else None
    norms = factors.norms[matrix.inputs][inputs] if factors.norms is not None else None
    score_rows, score_cols = (by_input, by_output) if layout.transposed else (by_output, by_input)
    row_norms, col_norms = (norms, None) if layout.transposed else (None, norms)
    return TileFactors(score_left, score_right, score_rows, score_cols, update_left, update_right, row_norms, col_norms)
