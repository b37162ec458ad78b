"""Train every weight, and prune none."""

from __future__ import annotations

from pst_ds.config.methods.method import Method

METHOD = Method("none", trains_everything=True, injects=False)
