"""Rank weights by magnitude times the norm of their input, and by learned scores."""

from torch import Tensor

from pst_ds.core.criteria.criterion import INPUT_NORMS, LEARNED_SCORES, Criterion, WeightSlice


class LearnedActivation(Criterion):
    """S = |W0 + beta U V| / scale . n + alpha1 A B + alpha2 (R 1' + 1 C'), with the norm n of each weight's input."""

    needs = frozenset({LEARNED_SCORES, INPUT_NORMS})
    has_kernels = True

    def scores(self, part: WeightSlice) -> Tensor:
        return part.add_learned_scores_(part.magnitude * part.input_norms)
