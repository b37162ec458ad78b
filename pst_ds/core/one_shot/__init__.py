"""One-shot masks from calibration examples: by a score per weight, by SparseGPT, which can also quantise, or by ALPS.

Swaps may refine each of the masks.
"""

from pst_ds.core.one_shot.alps import InputSpectrum, alps, input_spectrum
from pst_ds.core.one_shot.budgets import SPREAD, outlier_share, zeros_by_outliers
from pst_ds.core.one_shot.gram import DAMPING, UnitGram, unit_gram
from pst_ds.core.one_shot.scored import Compensated, keep_but, keep_by_score, output_error, wanda_scores
from pst_ds.core.one_shot.sparsegpt import InverseFactor, inverse_factor, round_under_mask, sparsegpt
from pst_ds.core.one_shot.swaps import refine_by_swaps

__all__ = [
    "DAMPING",
    "SPREAD",
    "Compensated",
    "InputSpectrum",
    "InverseFactor",
    "UnitGram",
    "alps",
    "input_spectrum",
    "inverse_factor",
    "keep_but",
    "keep_by_score",
    "outlier_share",
    "output_error",
    "refine_by_swaps",
    "round_under_mask",
    "sparsegpt",
    "unit_gram",
    "wanda_scores",
    "zeros_by_outliers",
]
