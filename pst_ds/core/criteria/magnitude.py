"""Rank weights by magnitude."""

from torch import Tensor

from pst_ds.core.criteria.criterion import Criterion, WeightSlice


class Magnitude(Criterion):
    """S = |W0 + beta U V| / scale, with the mean of |W0| of the matrix as scale."""

    has_kernels = True

    def scores(self, part: WeightSlice) -> Tensor:
        return part.magnitude
