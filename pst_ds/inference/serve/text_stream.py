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
        self._last: list[int] = []
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
        text = self._decoded(self._last + self._pending)
        is_complete = len(text) > len(self._last_text) and not text.endswith(_UNFINISHED)
        if not is_complete and len(self._pending) < _MOST_PENDING:
            return ""
        piece = text[len(self._last_text) :]
        self._last = self._pending
        self._pending = []
        self._last_text = self._decoded(self._last)
        return self._give(piece)

    def end(self) -> str:
        """Return the text held back."""
        text = self._decoded(self._last + self._pending)
        return self._give(text[len(self._last_text) :], is_last=True)

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _give(self, piece: str, is_last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        self._held = ""
        starts = [text.find(stop) for stop in self._stops if stop in text]
        if starts:
            self.stopped = True
            return text[: min(starts)]
        if is_last:
            return text
        # hold back the longest end of the text that a stop string may continue
        held = max((self._overlap(text, stop) for stop in self._stops), default=0)
        final = len(text) - held
        self._held = text[final:]
        return text[:final]

    def _overlap(self, text: str, stop: str) -> int:
        """Return the length of the longest end of ``text`` with which ``stop`` starts."""
        for size in range(len(stop) - 1, 0, -1):
            if text.endswith(stop[:size]):
                return size
        return 0
