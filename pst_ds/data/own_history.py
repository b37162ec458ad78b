"""What a user did before, put in front of a request: the nearest of it by BM25, and how often each answer was given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

from pst_ds.data.lamp import Turn, UserTurns
from pst_ds.errors import InputError

MOST_ANSWERS = 8
"""That a profile counts."""
MOST_CHARACTERS = 400
"""Of an earlier text; the rest of a longer one is left out."""


def require_retrieval() -> None:
    """Raise InputError when the library is not installed."""
    if find_spec("bm25s") is None:
        raise InputError("--retrieve needs bm25s, which is not installed: pip install 'pst-ds[retrieval]'")


def rows_of(turns: UserTurns, *, retrieve: int, profile: bool) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows of a user's history, and of the queries: {"user", "prompt", "completion"}.

    Each prompt has up to ``retrieve`` turns of the history before it, the nearest last, and with ``profile`` how often
    each answer was given. A turn of the history sees those before it alone, and queries all of them.
    """
    nearest = Nearest([f"{turn.text} {turn.answer}" for turn in turns.history]) if retrieve else None

    def row(turn: Turn, before: int) -> dict[str, str]:
        found = nearest.to(turn.text, retrieve, before) if nearest is not None else []
        lines = [profile_of(turns.history[:before])] if profile else []
        lines += [_line(turns.history[i]) for i in reversed(found)]
        return {
            "user": turns.user, "prompt": "\n".join([*filter(None, lines), turn.request]), "completion": turn.answer,
        }  # fmt: skip

    history = [row(turn, i) for i, turn in enumerate(turns.history)]
    return history, [row(turn, len(turns.history)) for turn in turns.queries]


def profile_of(history: Sequence[Turn]) -> str:
    """Return how often a user gave each answer, the most frequent first; "" where hardly any came twice."""
    counts = Counter(turn.answer for turn in history)
    if not counts or len(counts) > len(history) / 2:
        return ""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_ANSWERS]
    return "Answers so far: " + ", ".join(f"{answer} {count}" for answer, count in ranked)


class Nearest:
    """The texts of one user, to be found by their words (BM25)."""

    def __init__(self, texts: Sequence[str]):
        import bm25s

        self._words = [text.lower().split() for text in texts]
        self._index = None
        if any(self._words):
            self._index = bm25s.BM25()
            self._index.index(self._words, show_progress=False)

    def to(self, text: str, most: int, before: int) -> list[int]:
        """Return up to ``most`` texts among the first ``before`` that share a word with ``text``, the nearest first;
        of equal ones the later."""
        words = text.lower().split()
        if self._index is None or not words or not before:
            return []
        scores = self._index.get_scores(words)[:before]
        ranked = sorted(range(before), key=lambda i: (-scores[i], -i))
        return [i for i in ranked[:most] if scores[i] > 0.0]


def _line(turn: Turn) -> str:
    text, answer = turn.text[:MOST_CHARACTERS], turn.answer[:MOST_CHARACTERS]
    return answer if turn.text == turn.answer else f"{text} => {answer}"
