"""Train every weight, and prune none."""

from pst_ds.config.methods.method import Method

METHOD = Method("none", trains_everything=True, injects=False)
