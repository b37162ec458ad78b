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
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._last: list[int] = []
        """Tokens of the last piece."""
        self._last_text = ""
        self._pending: list[int] = []
        """Tokens after the last piece."""
        self._held = ""
        """Text that may be the start of a stop string."""
        self.count, self.stopped = 0, False
        """Tokens so far, and whether a stop string was found; the text after it is not returned."""

    def add(self, token: int) -> str:
        """Return the text that is final now; "" while a character or a stop string may be incomplete."""
        self.count += 1
        self._pending.append(token)
        text = self._decoded(self._last + self._pending)
        is_complete = len(text) > len(self._last_text) and not text.endswith(_UNFINISHED)
        if not is_complete and len(self._pending) < _MOST_PENDING:
            return ""
        piece = text[len(self._last_text) :]
        self._last, self._pending = self._pending, []
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
        text, self._held = self._held + piece, ""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        sizes = [size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
        upto = len(text) if is_last else len(text) - max(sizes, default=0)
        self._held = text[upto:]
        return text[:upto]
