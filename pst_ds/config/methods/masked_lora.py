"""Train an update U V under a fixed mask."""

from pst_ds.config.methods.method import LORA, Method

METHOD = Method("fixed", settings=LORA)
