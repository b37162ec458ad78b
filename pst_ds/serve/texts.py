"""Text from tokens that come one by one: whole characters, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""


class TextStream:
    """Text as it grows; pieces that are handed out are never taken back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._given = 0
        self.stopped = False
        """True once a stop text has come; what follows is not given out."""

    @property
    def count(self) -> int:
        """Tokens so far."""
        return len(self._ids)

    def add(self, token: int) -> str:
        """Return the text that is sure now; "" while a character or a stop text may be incomplete."""
        self._ids.append(token)
        text = self._text()
        return "" if text.endswith(_UNFINISHED) else self._give(text, len(text) - self._may_begin_stop(text))

    def end(self) -> str:
        """Return what was held back."""
        text = self._text()
        return self._give(text, len(text))

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _give(self, text: str, upto: int) -> str:
        if self.stopped:
            return ""
        places = [place for stop in self._stops if (place := text.find(stop, max(0, self._given - len(stop)))) >= 0]
        if places:
            self.stopped, upto = True, min(places)
        piece = text[self._given : upto]
        self._given = max(self._given, upto)
        return piece

    def _may_begin_stop(self, text: str) -> int:
        """Return how many of the last characters may be the beginning of a stop text."""
        return max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
