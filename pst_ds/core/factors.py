"""The small matrices of one PST layer, and their views for a rectangle of its stored weight.

Shapes, for O outputs, I inputs, P fused matrices, score rank k and update rank r:

    A (O, k)    B (P*k, I)    R (O,)    C (P, I)    U (O, r)    V (P*r, I)    G (P*r,) or (P,)

Each output row belongs to exactly one part, so A, R and U are shared by stacking, while B, C and V hold one set a
part. For an ordinary layer P = 1 and these are the matrices of the paper (arXiv 2205.11005, section 3). In a stack of
experts O and P count all of them, so every factor is in expert order.

A multiplicative update, SPP's (arXiv 2405.16057), has r groups of consecutive outputs in each part: its U is (O,), one
factor an output, and a row of V belongs to one group. :func:`grouped_columns` makes the (O, r) matrix of it.

The gates G of learned ranks (:mod:`pst_ds.core.updates.gates`) are folded into V, so no formula but that knows of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pst_ds.core.layout import Rect, StoredMatrix, WeightLayout
from pst_ds.core.updates.gates import gated_rows


@dataclass(frozen=True, slots=True)
class Constants:
    """The numbers of the score and of the update.

    S = |W| / weight_scale + alpha1 A B + alpha2 (R 1' + 1 C'),  W = W0 + beta U V
    |W| is |W| . 1 n' where the inputs have norms n.
    """

    alpha1: float = 1.0
    alpha2: float = 1.0
    beta: float = 1.0
    detach_magnitude: bool = False
    """True drops the path of the gradient through |W| in S."""
    magnitude: bool = True
    """False leaves |W| out of S."""
    frozen_magnitude: bool = False
    """True has |W0| in S, which the update does not move."""
    multiplicative: bool = False
    """True makes W = W0 + beta W0 . (U V), which keeps every zero of W0."""

    @property
    def update_in_scores(self) -> bool:
        """True if S is computed from the updated weight. The mask of a multiplicative update is chosen before it."""
        return not self.multiplicative and not self.frozen_magnitude

    @property
    def magnitude_has_gradient(self) -> bool:
        """True if the gradient of S reaches U and V through |W|."""
        return self.magnitude and not self.detach_magnitude and not self.frozen_magnitude

    def magnitude_factor(self, weight_scale: float) -> float:
        """Factor of |W| in S."""
        return 1.0 / weight_scale if self.magnitude else 0.0


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors a layer has; None for those it was built without. See the module's docstring for shapes."""

    A: Tensor | None = None
    B: Tensor | None = None
    R: Tensor | None = None
    C: Tensor | None = None
    U: Tensor | None = None
    V: Tensor | None = None
    norms: Tensor | None = None
    """(I,) fp32, of a stack of experts (E*I,): how large each input is, relative to their mean; not trained."""

    def of_expert(self, expert: int, num_experts: int) -> Factors:
        """Return views of the factors of one of ``num_experts`` experts."""
        found = {}
        for name, value in self._held():
            share = value.shape[0] // num_experts
            found[name] = value[expert * share : (expert + 1) * share]
        return Factors(**found)

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        return ((field.name, value) for field in fields(self) if (value := getattr(self, field.name)) is not None)

    def to(self, device: torch.device) -> Factors:
        """The same on ``device``."""
        return Factors(**{name: value.to(device) for name, value in self._held()})


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
    row_norms: Tensor | None = None
    """(rows,), of a weight stored (I, O)"""
    col_norms: Tensor | None = None
    """(cols,), of one stored (O, I)"""

    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        held = (
            self.score_left, self.score_right, self.score_rows, self.score_cols, self.update_left, self.update_right,
            self.row_norms, self.col_norms,
        )  # fmt: skip
        return [value for value in held if value is not None]


def tile_factors(factors: Factors, layout: WeightLayout, matrix: StoredMatrix, rect: Rect) -> TileFactors:
    """Views of the factors that make the scores and the update of ``rect``, which lies inside ``matrix``."""
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


def layer_factors(values: dict[str, Tensor], count: int, constants: Constants, norms: Tensor | None = None) -> Factors:
    """Return the matrices of the formulas from ``values``, those that a layer of ``count`` matrices holds, by name.

    They differ in a multiplicative update's U, and in the V of an update with gates.
    """
    if "G" in values:
        gates = values["G"]
        values = {name: value for name, value in values.items() if name != "G"}
        values["V"] = gated_rows(values["V"], gates, count)
    if constants.multiplicative and "U" in values:
        values = {**values, "U": grouped_columns(values["U"], count, values["V"].shape[0] // count)}
    return Factors(**values, norms=norms)


def group_of_rows(num_rows: int, num_matrices: int, num_groups: int, device: torch.device | None = None) -> Tensor:
    """Return which of its matrix's ``num_groups`` runs of nearly equal length each row belongs to: (num_rows,) int64.

    Run g of a matrix with n rows begins at floor(g n / num_groups). ``num_rows`` counts all ``num_matrices`` together.
    """
    per_matrix = max(num_rows // num_matrices, 1)
    return ((torch.arange(num_rows, device=device) % per_matrix + 1) * num_groups - 1) // per_matrix


def grouped_columns(column: Tensor, num_matrices: int, num_groups: int) -> Tensor:
    """(O,) to (O, num_groups): each value in the column of its row's group, zeros elsewhere in the row."""
    wide = column.new_zeros(column.numel(), num_groups)
    groups = group_of_rows(column.numel(), num_matrices, num_groups, column.device)
    return wide.scatter_(1, groups.unsqueeze(1), column.unsqueeze(1))


def ungrouped_columns(wide: Tensor, num_matrices: int) -> Tensor:
    """The adjoint of :func:`grouped_columns`: (O, num_groups) to (O,)."""
    groups = group_of_rows(wide.shape[0], num_matrices, wide.shape[1], wide.device)
    return wide.gather(1, groups.unsqueeze(1)).squeeze(1)
