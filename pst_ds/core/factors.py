"""The small tensors of one PST layer, and their views for a rectangle of its stored weight.

Shapes, for O outputs, I inputs, P fused matrices, score rank k and update rank r:

    A (O, k)    B (P*k, I)    R (O,)    C (P, I)    U (O, r)    V (P*r, I)

Each output row belongs to exactly one part, so A, R and U stack the parts, while B, C and V have one set per part. For
an ordinary layer P = 1, and these are the matrices of the paper (arXiv 2205.11005, section 3). In a stack of experts, O
and P count all experts, so every factor is in expert order.

U and V are the update of forms with kernels. The parameters of another form (:mod:`pst_ds.core.forms`) stand in
:attr:`Factors.update` by name; the first dimension of each is divided equally among the P matrices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch
from torch import Tensor

from pst_ds.core.forms.form import Tile, UpdateForm
from pst_ds.core.forms.low_rank import LOW_RANK
from pst_ds.core.layout import Rect, StoredMatrix, WeightLayout

SCORE_FACTORS = ("A", "B", "R", "C")
"""Factors of the scores, in the order of a layer's parameters."""


@dataclass(frozen=True, slots=True)
class Constants:
    """The constants of the score and of the update.

    S = |W| / weight_scale + alpha1 A B + alpha2 (R 1' + 1 C'),  W = W0 + beta U V, or as ``form`` computes it
    |W| is |W| . 1 n' where the inputs have norms n.
    """

    alpha1: float = 1.0
    alpha2: float = 1.0
    beta: float = 1.0
    frozen_magnitude: bool = False
    """True if S uses |W0|, which the update does not change and which passes no gradient, instead of |W|."""
    form: UpdateForm = LOW_RANK


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
    update: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters of an update form without kernels, by name."""

    @classmethod
    def of(cls, values: Mapping[str, Tensor], form: UpdateForm, norms: Tensor | None = None) -> Self:
        """Return the factors from a layer's trained parameters by name: those of the scores and of its ``form``."""
        fields_of_class: dict[str, Any] = {}
        update = {}
        for name, value in values.items():
            if form.has_kernels or name in SCORE_FACTORS:
                fields_of_class[name] = value
            else:
                update[name] = value
        return cls(**fields_of_class, norms=norms, update=update)

    def of_update(self) -> "Factors":
        """Return the factors of the update only."""
        return Factors(U=self.U, V=self.V, update=self.update)

    def of_scores(self) -> "Factors":
        """Return the factors of the scores only."""
        return Factors(A=self.A, B=self.B, R=self.R, C=self.C, norms=self.norms)

    def of_expert(self, expert: int, num_experts: int) -> "Factors":
        """Return views of the factors of one of ``num_experts`` experts."""

        def part(value: Tensor) -> Tensor:
            share = value.shape[0] // num_experts
            return value[expert * share : (expert + 1) * share]

        update = {name: part(value) for name, value in self.update.items()}
        return Factors(**{name: part(value) for name, value in self.held().items()}, update=update)

    def held(self) -> dict[str, Any]:
        """Return the factors with a field, and not None, by name; without :attr:`update`."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "update"}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, device: torch.device) -> "Factors":
        """Return the factors on ``device``."""
        update = {name: value.to(device) for name, value in self.update.items()}
        return Factors(**{name: value.to(device) for name, value in self.held().items()}, update=update)


@dataclass(frozen=True, slots=True)
class TileUpdate:
    """The parameters of an update form without kernels for one rectangle of the stored weight."""

    parameters: Mapping[str, Tensor]
    """Parameters of the whole matrix, by name."""
    tile: Tile
    transposed: bool
    """True if the rectangle is stored as (inputs, outputs)."""

    def applied(self, weight: Tensor, constants: Constants) -> Tensor:
        """Return the updated weight of ``weight``, (rows, cols) as stored: a new tensor, fp32 (fp64 for fp64)."""
        high = torch.promote_types(weight.dtype, torch.float32)
        wide = weight.to(high)
        by_output = wide.t() if self.transposed else wide
        updated = constants.form.apply(by_output, self._wide(high), self.tile, constants.beta)
        return updated.t() if self.transposed else updated

    def gradients(self, weight: Tensor, weight_gradient: Tensor, constants: Constants) -> dict[str, Tensor]:
        """Return the rectangle's terms of the gradients of :attr:`parameters`, fp32 (fp64 for fp64), by name."""
        high = torch.promote_types(weight.dtype, torch.float32)
        wide = weight.to(high)
        gradient = weight_gradient.to(high)
        if self.transposed:
            wide = wide.t()
            gradient = gradient.t()
        return constants.form.gradients(wide, gradient, self._wide(high), self.tile, constants.beta)

    def _wide(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: value.to(dtype) for name, value in self.parameters.items()}


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
    update: TileUpdate | None = None
    """Set for forms without kernels."""

    def held(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name; without :attr:`update`."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "update"}
        return {name: value for name, value in values.items() if value is not None}


def tile_factors(factors: Factors, layout: WeightLayout, matrix: StoredMatrix, rect: Rect) -> TileFactors:
    """Return views of the factors that compute the scores and the update of ``rect``, which lies inside ``matrix``."""
    outputs, inputs = matrix.ranges(rect, transposed=layout.transposed)

    def pair(by_output: Tensor | None, by_input: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if by_output is None or by_input is None:
            return None, None
        rank = by_output.shape[1]
        outer = by_output[matrix.outputs][outputs]  # (outputs, rank)
        inner = by_input[matrix.index * rank : (matrix.index + 1) * rank, inputs]  # (rank, inputs)
        return (inner.t(), outer.t()) if layout.transposed else (outer, inner)

    score_left, score_right = pair(factors.A, factors.B)
    update_left, update_right = pair(factors.U, factors.V)
    by_output = factors.R[matrix.outputs][outputs] if factors.R is not None else None
    by_input = factors.C[matrix.index, inputs] if factors.C is not None else None
    norms = factors.norms[matrix.inputs][inputs] if factors.norms is not None else None
    update = None
    if factors.update:
        parameters = {name: rows_of_matrix(value, matrix, layout) for name, value in factors.update.items()}
        num_outputs = layout.out_features // layout.num_matrices
        update = TileUpdate(parameters, Tile(outputs, inputs, num_outputs, layout.in_features), layout.transposed)
    # rows of the stored weight are outputs, or inputs if it is transposed
    return TileFactors(
        score_left=score_left,
        score_right=score_right,
        score_rows=by_input if layout.transposed else by_output,
        score_cols=by_output if layout.transposed else by_input,
        update_left=update_left,
        update_right=update_right,
        row_norms=norms if layout.transposed else None,
        col_norms=None if layout.transposed else norms,
        update=update,
    )


def rows_of_matrix(value: Tensor, matrix: StoredMatrix, layout: WeightLayout) -> Tensor:
    """Return the view of one matrix in a parameter that stacks those of all matrices of a layer."""
    share = value.shape[0] // layout.num_matrices
    return value[matrix.index * share : (matrix.index + 1) * share]
