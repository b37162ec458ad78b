"""Train every weight under a fixed mask, which `pst.initial_mask` names."""

from pst_ds.config.methods.method import WEIGHTS, Method

METHOD = Method("fixed", trains_everything=True, settings=WEIGHTS)
