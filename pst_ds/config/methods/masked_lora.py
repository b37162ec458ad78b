"""Train an update U V under a fixed mask."""

from __future__ import annotations

from pst_ds.config.methods.method import LORA, Method

METHOD = Method("fixed", settings=LORA)
