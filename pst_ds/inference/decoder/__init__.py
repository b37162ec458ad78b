"""Decode transformers causal language models on a CPU in native code, several times as fast as torch.

    decoder = Decoder.from_pretrained("export-int8", context=2048)
    for token in decoder.stream(prompt_ids, max_new_tokens=64): ...

docs/how-to/inference.md lists the supported models and measured speeds.
"""

from pst_ds.inference.decoder.decoder import Decoder
from pst_ds.inference.decoder.sampling import Sampling
from pst_ds.inference.decoder.table import DecoderError

__all__ = ["Decoder", "DecoderError", "Sampling"]
