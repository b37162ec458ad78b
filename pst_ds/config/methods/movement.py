"""Train every weight, and prune along the schedule by a score of each (arXiv 2005.07683)."""

from pst_ds.config.methods.method import WEIGHTS, Method

METHOD = Method("ramp", trains_everything=True, settings={**WEIGHTS, "full_scores": True})
