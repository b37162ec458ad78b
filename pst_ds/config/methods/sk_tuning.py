"""Train a prompt that begins as a text, under a fixed mask, and no weights (arXiv 2410.08598)."""

from pst_ds.config.methods.method import LORA, Method

METHOD = Method(
    "fixed",
    settings={**LORA, "update_rank": 0, "update_embeddings": ()},
    prompt_text="read the following text carefully:",
)
