"""Train every weight, and prune the smallest along the schedule (arXiv 1710.01878)."""

from pst_ds.config.methods.method import WEIGHTS, Method

METHOD = Method("ramp", trains_everything=True, settings=WEIGHTS)
