"""Rank weights by magnitude and learned scores, as PST does (arXiv 2205.11005)."""

from torch import Tensor

from pst_ds.core.criteria.criterion import LEARNED_SCORES, Criterion, WeightSlice


class Learned(Criterion):
    """S = |W0 + beta U V| / scale + alpha1 A B + alpha2 (R 1' + 1 C')."""

    needs = frozenset({LEARNED_SCORES})
    has_kernels = True

    def scores(self, part: WeightSlice) -> Tensor:
        return part.add_learned_scores_(part.magnitude)
