"""Masks made once, on calibration text: by a score of every weight, by SparseGPT, which rounds too, or by ALPS."""

from pst_ds.core.one_shot.alps import InputSpectrum, alps, input_spectrum
from pst_ds.core.one_shot.scored import keep_but, keep_by_score, output_error, wanda_scores
from pst_ds.core.one_shot.sparsegpt import (
    DAMPING,
    Compensated,
    InverseFactor,
    inverse_factor,
    round_under_mask,
    sparsegpt,
)

__all__ = [
    "DAMPING",
    "Compensated",
    "InputSpectrum",
    "InverseFactor",
    "alps",
    "input_spectrum",
    "inverse_factor",
    "keep_but",
    "keep_by_score",
    "output_error",
    "round_under_mask",
    "sparsegpt",
    "wanda_scores",
]
