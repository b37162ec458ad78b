"""The small tensors of one PST layer, and their views for a rectangle of its stored weight.

Shapes, for O outputs, I inputs, P fused matrices, score rank k and update rank r:

    A (O, k)    B (P*k, I)    R (O,)    C (P, I)    U (O, r)    V (P*r, I)

Each output row belongs to exactly one part, so A, R and U stack the parts, while B, C and V have one set per part. For
an ordinary layer P = 1, and these are the matrices of the paper (arXiv 2205.11005, section 3). In a stack of experts, O
and P count all experts, so every factor is in expert order.

U and V are the update of forms with kernels. beside_U and beside_V have the same shapes and belong to the form
"beside", whose product the mask does not cut. The parameters of another form (:mod:`pst_ds.core.forms`) stand in
:attr:`Factors.update` by name; the first dimension of each is divided equally among the P matrices.
"""

from collections.abc import Callable, Mapping
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
    beside_U: Tensor | None = None
    beside_V: Tensor | None = None
    norms: Tensor | None = None
    """(I,) fp32, or (E*I,) for a stack of experts: norm of each input relative to their mean. Not trained."""
    update: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters of an update form without kernels, by name."""

    @classmethod
    def of(cls, values: Mapping[str, Tensor], form: UpdateForm, norms: Tensor | None = None) -> Self:
        """Return the factors from a layer's trained parameters by name: those of the scores and of its ``form``."""
        fields_of_class: dict[str, Any] = {}
        update: dict[str, Tensor] = {}
        for name, value in values.items():
            if form.has_kernels or name in SCORE_FACTORS:
                fields_of_class[name] = value
            elif form.is_beside:
                fields_of_class[f"beside_{name}"] = value
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
            # The first dimension of every factor is in expert order.
            share = value.shape[0] // num_experts
            return value[expert * share : (expert + 1) * share]

        return self._mapped(part)

    def held(self) -> dict[str, Any]:
        """Return the factors with a field, and not None, by name; without :attr:`update`."""
        return _tensors_of(self)

    def to(self, device: torch.device) -> "Factors":
        """Return the factors on ``device``."""
        return self._mapped(lambda value: value.to(device))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> "Factors":
        """Return the factors with ``function`` applied to each, and to each of :attr:`update`."""
        values: dict[str, Any] = {name: function(value) for name, value in self.held().items()}
        update = {name: function(value) for name, value in self.update.items()}
        return Factors(**values, update=update)


def _tensors_of(factors: "Factors | TileFactors") -> dict[str, Any]:
    """Return the fields that are not None, by name, except "update", which holds several tensors."""
    tensors: dict[str, Any] = {}
    for each in fields(factors):
        value = getattr(factors, each.name)
        if each.name != "update" and value is not None:
            tensors[each.name] = value
    return tensors


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
        # Forms see every matrix as (outputs, inputs), in fp32 at least, and the result is rounded once.
        high = torch.promote_types(weight.dtype, torch.float32)
        wide = weight.to(high)
        if self.transposed:
            wide = wide.t()
        updated = constants.form.apply(wide, self._wide(high), self.tile, constants.beta)
        if self.transposed:
            return updated.t()
        return updated

    def gradients(self, weight: Tensor, weight_gradient: Tensor, constants: Constants) -> dict[str, Tensor]:
        """Return the rectangle's terms of the gradients of :attr:`parameters`, fp32 (fp64 for fp64), by name."""
        high = torch.promote_types(weight.dtype, torch.float32)
        wide = weight.to(high)
        gradient = weight_gradient.to(high)
        if self.transposed:
            wide = wide.t()
            gradient = gradient.t()
        # By place, because forms of other packages may name their arguments differently.
        return constants.form.gradients(wide, gradient, self._wide(high), self.tile, constants.beta)

    def _wide(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the parameters in ``dtype``."""
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
        return _tensors_of(self)


def tile_factors(factors: Factors, layout: WeightLayout, matrix: StoredMatrix, rect: Rect) -> TileFactors:
    """Return views of the factors that compute the scores and the update of ``rect``, which lies inside ``matrix``."""
    outputs, inputs = matrix.ranges(rect, transposed=layout.transposed)

    def pair(by_output: Tensor | None, by_input: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the views of A and B, or of U and V, as (outputs, rank) and (rank, inputs)."""
        if by_output is None or by_input is None:
            return None, None
        rank = by_output.shape[1]
        first_row = matrix.index * rank
        return by_output[matrix.outputs][outputs], by_input[first_row : first_row + rank, inputs]

    score_by_output, score_by_input = pair(factors.A, factors.B)
    update_by_output, update_by_input = pair(factors.U, factors.V)
    R = None
    if factors.R is not None:
        R = factors.R[matrix.outputs][outputs]
    C = None
    if factors.C is not None:
        C = factors.C[matrix.index, inputs]
    norms = None
    if factors.norms is not None:
        norms = factors.norms[matrix.inputs][inputs]
    update = None
    if factors.update:
        update = _tile_update(factors.update, layout, matrix, outputs, inputs)
    # Rows of the stored weight are outputs, or inputs if it is transposed; (L R)' is R' L'.
    if layout.transposed:
        return TileFactors(
            score_left=_transposed(score_by_input),
            score_right=_transposed(score_by_output),
            score_rows=C,
            score_cols=R,
            update_left=_transposed(update_by_input),
            update_right=_transposed(update_by_output),
            row_norms=norms,
            update=update,
        )
    return TileFactors(
        score_left=score_by_output,
        score_right=score_by_input,
        score_rows=R,
        score_cols=C,
        update_left=update_by_output,
        update_right=update_by_input,
        col_norms=norms,
        update=update,
    )


def _transposed(factor: Tensor | None) -> Tensor | None:
    """Return the transposed view of a factor, if there is one."""
    return None if factor is None else factor.t()


def _tile_update(
    update: Mapping[str, Tensor], layout: WeightLayout, matrix: StoredMatrix, outputs: slice, inputs: slice
) -> TileUpdate:
    """Return the parameters of an update form for ``outputs`` and ``inputs`` of ``matrix``."""
    tile = Tile(
        outputs=outputs,
        inputs=inputs,
        num_outputs=layout.out_features // layout.num_matrices,
        num_inputs=layout.in_features,
    )
    parameters = {name: rows_of_matrix(value, matrix, layout) for name, value in update.items()}
    return TileUpdate(parameters=parameters, tile=tile, transposed=layout.transposed)


def rows_of_matrix(value: Tensor, matrix: StoredMatrix, layout: WeightLayout) -> Tensor:
    """Return the view of one matrix in a parameter that stacks those of all matrices of a layer."""
    share = value.shape[0] // layout.num_matrices
    return value[matrix.index * share : (matrix.index + 1) * share]
