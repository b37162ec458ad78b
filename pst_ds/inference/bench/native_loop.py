"""The native loop as a variant of ``pst-ds bench``."""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from pst_ds.inference.decoder import Decoder, DecoderError
from pst_ds.inference.hf.model_folder import ModelFolder


class NativeLoop:
    """A folder with quantised values in :class:`~pst_ds.inference.decoder.Decoder`; its weights are loaded once."""

    def __init__(self, decoder: Decoder, file_bytes: int | None):
        self.decoder, self._file_bytes = decoder, file_bytes

    @classmethod
    def of(cls, folder: ModelFolder, positions: int, sequences: int) -> NativeLoop | None:
        """Open ``folder`` for ``sequences``. Return None if its values are not quantised, or the loop does not
        support it.
        """
        if not folder.is_causal or folder.values is None:
            return None
        try:
            decoder = Decoder.from_pretrained(folder.path, positions, sequences=sequences)
        except (DecoderError, RuntimeError) as error:
            print(f"the native loop is not measured: {error}", file=sys.stderr)
            return None
        return cls(decoder, folder.weight_file_bytes)

    def facts(self) -> dict[str, int | None]:
        facts = {"file_bytes": self._file_bytes, "sparse_layers": 0, "copies": 1}
        return {"resident_bytes": self.decoder.weight_bytes, **facts}

    def timed(self, ids: Tensor, new_tokens: int) -> tuple[list[float], list[float]]:
        """Return the seconds of the prefill of ``ids`` (batch, tokens), and of each step."""
        decoder = self.decoder
        decoder.threads = torch.get_num_threads()
        for sequence in range(len(ids)):
            decoder.reset(sequence=sequence)
        prompts = ids.tolist()
        start = time.perf_counter()
        logits = torch.stack([decoder.forward(prompt, sequence=number) for number, prompt in enumerate(prompts)])
        prefill = time.perf_counter() - start
        steps = []
        for _ in range(max(1, new_tokens - 1)):
            tokens = logits.argmax(-1).tolist()
            start = time.perf_counter()
            logits = decoder.step(tokens)
            steps.append(time.perf_counter() - start)
        return [prefill], steps
