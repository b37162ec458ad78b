"""A transformers causal language model as a native loop over packed weights, for CPUs: several times torch's speed.

    decoder = Decoder.from_pretrained("export-int8", context=2048)
    for token in decoder.stream(prompt_ids, max_new_tokens=64): ...

docs/decoding.md has the models that it takes and what it measures.
"""

from pst_ds.inference.decoder.decoder import Decoder
from pst_ds.inference.decoder.sampling import Sampling
from pst_ds.inference.decoder.table import DecoderError

__all__ = ["Decoder", "DecoderError", "Sampling"]
