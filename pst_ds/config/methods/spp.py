"""Train a multiplicative update under a fixed mask (arXiv 2405.16057)."""

from pst_ds.config.methods.method import LORA, Method

METHOD = Method(
    "fixed",
    settings={**LORA, "multiplicative_update": True, "update_embeddings": ()},
    defaults={"update_rank": 16, "beta": 2.0},  # the groups and the factor of its authors
)
