"""Text as it is generated, and when each token came."""

from __future__ import annotations

import time
from typing import Any

from transformers import TextStreamer


class TimedStreamer(TextStreamer):  # type: ignore[misc]
    """Prints the new text to stdout. The prompt comes first, before the prefill, then every token once it is known."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._times: list[float] = []
        self._prompt_tokens = 0

    def put(self, value: Any) -> None:
        if not self._times:
            self._prompt_tokens = value.numel()
        self._times.append(time.perf_counter())
        super().put(value)

    def rates(self) -> dict[str, float | None]:
        """Seconds to the first token, and tokens a second of the prefill and after it; None where one token came."""
        prompt, first, *later = self._times
        decode = len(later) / (later[-1] - first) if later else None
        return {
            "first_token_seconds": first - prompt,
            "prefill_tokens_per_second": self._prompt_tokens / (first - prompt),
            "decode_tokens_per_second": decode,
        }
