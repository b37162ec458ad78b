"""Like "movement", with one threshold for all matrices and a penalty on the scores (arXiv 2005.07683)."""

from pst_ds.config.methods.method import WEIGHTS, Method

METHOD = Method(
    "ramp", trains_everything=True, settings={**WEIGHTS, "full_scores": True, "pattern": "global"}, score_penalty=1.0
)
