"""Base class of criteria, which rank the weights of a layer, and the slice of a weight that they see."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from pst_ds.core.factors import Constants, TileFactors
from pst_ds.core.scores import add_learned_scores_, sliced_weight

LEARNED_SCORES = "learned_scores"
INPUT_NORMS = "input_norms"
GRADIENTS = "gradients"
NEEDS = frozenset({LEARNED_SCORES, INPUT_NORMS, GRADIENTS})
"""What a criterion can ask for in :attr:`Criterion.needs`."""


@dataclass(frozen=True)
class WeightSlice:
    """Some weights of one matrix, and what they can be ranked by.

    Slices are rectangles of a stored weight, (rows, cols), or single weights from anywhere in a matrix, (n, 1). Every
    other tensor broadcasts to the shape of ``base``, so that one elementwise formula serves both.
    """

    layer: str
    """Name of the layer in the model."""
    base: Tensor
    """W0, or the trained weight that replaces it, in the dtype that it is stored in."""
    outputs: Tensor
    """int64: the number of each weight's output among the outputs of the layer, experts one after another."""
    inputs: Tensor
    """int64: the number of each weight's input."""
    magnitude_scale: float
    """Mean of |W0| of the whole matrix; 1 with ``relative_magnitude = false``."""
    constants: Constants
    factors: TileFactors
    """Factors of the slice; without those that the criterion does not need."""
    weight_gradient: Tensor | None = None

    @cached_property
    def weight(self) -> Tensor:
        """W0 + beta U V, fp32."""
        return sliced_weight(self.base, self.factors, self.constants)

    @property
    def magnitude(self) -> Tensor:
        """|W| / magnitude_scale, fp32; of W0 with ``frozen_magnitude``. A new tensor in each call."""
        weight = self.weight
        if self.constants.frozen_magnitude:
            weight = self.base.to(torch.float32)
        # A product, not a quotient: torch divides by a number differently on CPUs and on CUDA.
        return weight.abs() * (1.0 / self.magnitude_scale)

    @property
    def input_norms(self) -> Tensor:
        """Norm of each weight's input relative to the mean norm, fp32. Needs "input_norms"."""
        # Norms belong to inputs, which are the rows of a weight stored as (inputs, outputs).
        if self.factors.row_norms is not None:
            return self.factors.row_norms.unsqueeze(1)
        if self.factors.col_norms is not None:
            return self.factors.col_norms
        raise _not_needed(INPUT_NORMS)

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss by M . W, fp32, summed over the last batch of all ranks. Needs "gradients"."""
        if self.weight_gradient is None:
            raise _not_needed(GRADIENTS)
        return self.weight_gradient

    def add_learned_scores_(self, scores: Tensor) -> Tensor:
        """Add alpha1 A B + alpha2 (R 1' + 1 C') to ``scores`` in place, and return them. Needs "learned_scores"."""
        add_learned_scores_(scores, self.factors, self.constants)
        return scores


def _not_needed(name: str) -> ValueError:
    """Return the error of a criterion that reads ``name`` without asking for it."""
    return ValueError(f'the criterion reads {name}, which its needs do not name. Add "{name}" to them')


class Criterion:
    """Ranks weights: those with the lowest scores are pruned.

    A subclass sets :attr:`needs` and has :meth:`scores`. It is made without arguments when a run file names it.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """What it reads besides weights, of :data:`NEEDS`."""
    has_kernels: ClassVar[bool] = False
    """True if its scores are those of :func:`pst_ds.core.scores.importance` with only the terms in ``needs``. Native
    loops and Triton kernels then compute them, and :meth:`scores` is their reference."""

    def scores(self, part: WeightSlice) -> Tensor:
        """Return the scores of a slice, fp32 in the shape of ``part.base``.

        The score of a weight must have the same bits in any slice, or masks depend on the number of ranks: work
        elementwise with ``+ - * /``, ``abs``, ``sqrt``, comparisons and integers, which round alike everywhere. Not
        with matrix products, sums over the slice, ``exp`` or random numbers from a generator.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scores")

    def visible(self, factors: TileFactors) -> TileFactors:
        """Return the factors without those that the criterion does not need."""
        # The layer may have factors that another criterion has trained.
        if LEARNED_SCORES not in self.needs:
            factors = replace(factors, score_left=None, score_right=None, score_rows=None, score_cols=None)
        if INPUT_NORMS not in self.needs:
            factors = replace(factors, row_norms=None, col_norms=None)
        return factors


class FunctionCriterion(Criterion):
    """A criterion from a function of a slice that returns its scores."""

    def __init__(self, function: Callable[[WeightSlice], Tensor]):
        self._function = function

    def scores(self, part: WeightSlice) -> Tensor:
        return self._function(part)
