"""Rank weights by magnitude times the norm of their input, as in Wanda (arXiv 2306.11695)."""

from torch import Tensor

from pst_ds.core.criteria.criterion import INPUT_NORMS, Criterion, WeightSlice


class Activation(Criterion):
    """S = |W0 + beta U V| / scale . n, with the norm n of each weight's input."""

    needs = frozenset({INPUT_NORMS})
    has_kernels = True

    def scores(self, part: WeightSlice) -> Tensor:
        return part.magnitude * part.input_norms
