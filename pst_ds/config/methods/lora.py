"""Train an update U V, and prune no weight (arXiv 2106.09685)."""

from pst_ds.config.methods.method import LORA, Method

METHOD = Method("none", settings=LORA)
