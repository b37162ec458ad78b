"""Sparsity patterns: the units of weights that are pruned together, which tile a stored matrix.

    "matrix"   single weights, ranked within their matrix (the paper's)
    "stack"    single weights, ranked over all matrices of their layer: fused matrices, or a stack of experts
    "global"   single weights, ranked over all matrices of the pattern
    "row"      single weights, ranked within their output: the same sparsity for every output
    "2:4"      N:M: at most N of every M consecutive inputs of an output are kept, N < M <= 16
    "16x1"     blocks of outputs x inputs, kept or pruned together, ranked within their matrix by summed scores
    "experts"  whole experts of a block, ranked by their outputs; see :mod:`pst_ds.masks.experts`

All positions refer to the *stored* weight, as in :mod:`pst_ds.core.layout`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # run files are read without torch
    from pst_ds.core.layout import WeightLayout

Kind = Literal["matrix", "stack", "global", "row", "n:m", "block", "experts"]
MAX_M = 16
"""Largest M of N:M."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A sparsity pattern; see :func:`parse_pattern`."""

    kind: Kind
    n: int = 0
    m: int = 0
    """For N:M: n of m consecutive inputs are kept."""
    outputs: int = 1
    inputs: int = 1

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        if self.kind == "block":
            return f"{self.outputs}x{self.inputs}"
        return self.kind

    @property
    def fixed_sparsity(self) -> float | None:
        """The only final sparsity that the pattern supports, 1 - N/M; None if it supports any."""
        if self.kind != "n:m":
            return None
        return (self.m - self.n) / self.m

    @property
    def pools_matrices(self) -> bool:
        """True if weights of several matrices are ranked against each other."""
        return self.kind in ("stack", "global")

    def unit(self, layout: WeightLayout) -> tuple[int, int]:
        """Return (rows, cols) of a unit in the stored weight."""
        by_output = {"row": (1, layout.in_features), "n:m": (1, self.m), "block": (self.outputs, self.inputs)}
        outputs, inputs = by_output.get(self.kind, (1, 1))
        if layout.transposed:
            return inputs, outputs
        return outputs, inputs

    def require_fit(self, layout: WeightLayout) -> None:
        """Raise ValueError if units do not tile each matrix of ``layout``, naming the number that does not divide."""
        outputs, inputs = self.unit(layout)
        if layout.transposed:
            outputs, inputs = inputs, outputs
        per_matrix = layout.out_features // layout.num_matrices
        if layout.in_features % inputs:
            raise ValueError(f"pattern {self} needs in_features divisible by {inputs}, got {layout.in_features}")
        if per_matrix % outputs:
            raise ValueError(f"pattern {self} needs out_features divisible by {outputs}, got {per_matrix}")

    def aligned(self, layout: WeightLayout, start: int, stop: int) -> tuple[int, int]:
        """Return the flat range of whole units (and whole rows of units) that covers the weights [start, stop)."""
        if stop <= start:
            return start, start
        rows, cols = self.unit(layout)
        step = cols
        if rows > 1:
            # A unit of several rows is not consecutive in memory; a whole row of units is.
            step = rows * layout.shape[1]
        return start // step * step, min(-(-stop // step) * step, layout.numel)


def parse_pattern(text: str) -> Pattern:
    """Return the pattern with a name. Raises ValueError, listing the known names."""
    if text in ("matrix", "stack", "global", "row", "experts"):
        return Pattern(text)  # type: ignore[arg-type]
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n = int(match[1])
        m = int(match[2])
        if not 0 < n < m <= MAX_M:
            raise ValueError(f"pattern {text!r} needs 0 < N < M <= {MAX_M}")
        return Pattern("n:m", n=n, m=m)
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        outputs = int(match[1])
        inputs = int(match[2])
        if outputs * inputs < 2:
            raise ValueError(f'pattern {text!r} needs blocks of at least 2 weights; single weights are "matrix"')
        return Pattern("block", outputs=outputs, inputs=inputs)
    raise ValueError(
        f'pattern {text!r} is not known; there are "matrix", "stack", "global", "row", N:M such as "2:4", and blocks '
        'of outputs x inputs such as "16x1"'
    )
