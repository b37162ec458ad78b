"""Add a user's history to prompts: the most similar earlier turns by BM25, and the frequency of each answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

from pst_ds.data.lamp import Turn, UserTurns
from pst_ds.errors import InputError

MOST_ANSWERS = 8
"""Maximum answers in a profile."""
MOST_CHARACTERS = 400
"""Maximum characters of an earlier text; longer ones are truncated."""


def require_retrieval() -> None:
    """Raise InputError if bm25s is not installed."""
    if find_spec("bm25s") is None:
        raise InputError("--retrieve needs bm25s, which is not installed. Run pip install 'pst-ds[retrieval]'")


def rows_of(turns: UserTurns, *, retrieve: int, profile: bool) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows of a user's history, and of the queries: {"user", "prompt", "completion"}.

    Each prompt starts with up to ``retrieve`` earlier turns, the most similar last, and with ``profile`` also the
    frequency of each answer. Turns of the history see only earlier turns; queries see all.
    """
    nearest = Nearest([f"{turn.text} {turn.answer}" for turn in turns.history]) if retrieve else None

    def row(turn: Turn, before: int) -> dict[str, str]:
        found = nearest.to(turn.text, retrieve, before) if nearest is not None else []
        lines = [profile_of(turns.history[:before])] if profile else []
        lines += [_line(turns.history[i]) for i in reversed(found)]
        return {
            "user": turns.user,
            "prompt": "\n".join([*filter(None, lines), turn.request]),
            "completion": turn.answer,
        }

    history = [row(turn, i) for i, turn in enumerate(turns.history)]
    return history, [row(turn, len(turns.history)) for turn in turns.queries]


def profile_of(history: Sequence[Turn]) -> str:
    """Return the frequency of each answer of a user, the most frequent first; "" if most answers differ."""
    counts = Counter(turn.answer for turn in history)
    if not counts or len(counts) > len(history) / 2:
        return ""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_ANSWERS]
    return "Answers so far: " + ", ".join(f"{answer} {count}" for answer, count in ranked)


class Nearest:
    """BM25 index of one user's texts."""

    def __init__(self, texts: Sequence[str]):
        import bm25s

        self._words = [text.lower().split() for text in texts]
        self._index = None
        if any(self._words):
            self._index = bm25s.BM25()
            self._index.index(self._words, show_progress=False)

    def to(self, text: str, most: int, before: int) -> list[int]:
        """Return the indices of up to ``most`` of the first ``before`` texts that share a word with ``text``, the most
        similar first; later texts win ties."""
        words = text.lower().split()
        if self._index is None or not words or not before:
            return []
        scores = self._index.get_scores(words)[:before]
        ranked = sorted(range(before), key=lambda i: (-scores[i], -i))
        return [i for i in ranked[:most] if scores[i] > 0.0]


def _line(turn: Turn) -> str:
    text, answer = turn.text[:MOST_CHARACTERS], turn.answer[:MOST_CHARACTERS]
    return answer if turn.text == turn.answer else f"{text} => {answer}"
