"""Streaming detokenisation: complete characters, up to a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase as Tokenizer

_UNFINISHED = "\ufffd"
"""Placeholder that tokenizers write for the bytes of an incomplete character."""
_MOST_PENDING = 64
"""Tokens that may wait for the end of a character. A character has at most 4 bytes, so more tokens are not text."""


class TextStream:
    """Generated text in pieces that are final once returned, at a cost per token that does not grow with the text.

    Only the tokens of the last piece are decoded again, since some decoders treat the first token differently.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._last_tokens: list[int] = []
        """Tokens of the last piece."""
        self._last_text = ""
        self._pending: list[int] = []
        """Tokens after the last piece."""
        self._held = ""
        """Text that may be the start of a stop string."""
        self.count = 0
        """Tokens so far."""
        self.stopped = False
        """True once a stop string was found; the text after it is not returned."""

    def add(self, token: int) -> str:
        """Return the text that is final now; "" while a character or a stop string may be incomplete."""
        self.count += 1
        self._pending.append(token)
        text = self._decoded(self._last_tokens + self._pending)
        # the text does not grow by tokens without text, such as special ones
        is_complete = len(text) > len(self._last_text) and not text.endswith(_UNFINISHED)
        if not is_complete and len(self._pending) < _MOST_PENDING:
            return ""
        # the decoded text starts with that of the last piece, which was returned before
        piece = text[len(self._last_text) :]
        self._last_tokens = self._pending
        self._pending = []
        self._last_text = self._decoded(self._last_tokens)
        return self._released(piece)

    def end(self) -> str:
        """Return the text held back."""
        text = self._decoded(self._last_tokens + self._pending)
        return self._released(text[len(self._last_text) :], is_last=True)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _released(self, piece: str, is_last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        self._held = ""
        stop_starts: list[int] = []
        for stop in self._stops:
            if stop in text:
                stop_starts.append(text.find(stop))
        if stop_starts:
            self.stopped = True
            # up to the stop string that comes first in the text, not first in the request
            return text[: min(stop_starts)]
        if is_last:
            return text
        # hold back the longest end of the text that a stop string may continue
        held = 0
        for stop in self._stops:
            held = max(held, self._overlap(text, stop))
        final = len(text) - held
        self._held = text[final:]
        return text[:final]

    def _overlap(self, text: str, stop: str) -> int:
        """Return the length of the longest end of ``text`` with which ``stop`` starts."""
        for size in range(len(stop) - 1, 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
