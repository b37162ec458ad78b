"""Prune along the schedule by magnitude and low-rank scores, and train an update U V."""

from pst_ds.config.methods.method import Method

METHOD = Method("ramp")
