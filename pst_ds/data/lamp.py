"""Read LaMP files (arXiv 2304.11406): each user's history and queries, and prompts with parts of the history.

    questions   [{"id": ..., "input": the request, "profile": [{"id": ..., "text": ..., a field of the answer: ...}]}]
    answers     {"golds": [{"id": ..., "output": ...}]}

A file with both, with one entry per user, is also read: {"user_id", "profile", "query": [{"id", "input", "gold"}]}. The
fields of the profile determine the task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, StringConstraints, TypeAdapter, ValidationError, model_validator

from pst_ds.errors import InputError, first_problem

MOST_ANSWERS = 8
"""Maximum answers in a profile."""
MOST_CHARACTERS = 400
"""Maximum characters of an earlier text; longer ones are truncated."""
T = TypeVar("T")
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Query(BaseModel, coerce_numbers_to_str=True):
    id: str = ""
    input: Text
    gold: Text | None = None


class _Entry(BaseModel, coerce_numbers_to_str=True):
    user_id: str = ""
    id: str = ""
    profile: list[dict[str, object]]
    query: list[_Query]

    @model_validator(mode="before")
    @classmethod
    def _with_query(cls, entry: object) -> object:
        return {"query": [entry], **entry} if isinstance(entry, dict) else entry


class _Gold(BaseModel, coerce_numbers_to_str=True):
    id: str
    output: str


class _Answers(BaseModel):
    golds: list[_Gold]


@dataclass(frozen=True, slots=True)
class Turn:
    """A request and its answer."""

    request: str
    answer: str
    text: str
    """The request without the instruction that all requests share."""


@dataclass(slots=True)
class UserTurns:
    """History of one user, by date if the file has dates, and queries."""

    user: str
    history: list[Turn] = field(default_factory=list)
    queries: list[Turn] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Kind:
    """A task of LaMP: the fields of the profile for a query's text and answer."""

    text: str
    answer: str
    marks: tuple[str, ...] = ()
    """Marks before a query's text; everything up to the mark is the instruction, also used for the history."""
    instruction: str = ""
    """Instruction of the history, if its requests differ from the queries."""

    def split(self, request: str) -> tuple[str, str]:
        """Return (instruction, text) of a query."""
        for mark in self.marks:
            before, found, text = request.partition(mark)
            if found:
                return before + found, text
        return "", request


_KINDS = (
    _Kind("description", "tag", ("description: ",)),  # movies
    _Kind("text", "category", ("article: ",)),  # news
    _Kind("text", "score", ("review: ",)),  # ratings
    _Kind("text", "title", ("article: ", "email: ")),  # headlines, subjects
    _Kind("abstract", "title", ("paper: ",)),  # titles
    _Kind("", "text", ("before or after it: ",), "Write a tweet"),  # tweets; the profile has no requests
)
_CITATION = _Kind("title", "abstract", (), "Write the abstract of a paper of yours: ")
"""Its queries choose between two references, which the profile does not have."""


def read_lamp(questions: Path, answers: Path | None = None) -> list[UserTurns]:
    """Read one split, with users in the order of the file. Raises InputError for another format or a missing answer."""
    entries = _read(questions, list[_Entry])
    golds = {} if answers is None else {gold.id: gold.output for gold in _read(answers, _Answers).golds}
    users: dict[str, UserTurns] = {}
    for number, entry in enumerate(entries):
        where = f"{questions}: entry {number}"
        kind = _kind_of(entry, where)
        user = entry.user_id or entry.id or str(number)
        turns = users.setdefault(user, UserTurns(user))
        instruction = kind.instruction
        for query in entry.query:
            answer = golds.get(query.id, query.gold)
            if answer is None:
                raise InputError(
                    f"{where}: question {query.id!r} has no answer. Name LaMP's outputs file of the same split"
                )
            before, text = kind.split(query.input)
            instruction = instruction or before
            turns.queries.append(Turn(query.input, answer, text))
        if not turns.history:
            items = entry.profile
            if all("date" in item for item in items):
                items = sorted(items, key=lambda item: str(item["date"]))
            for item in items:
                text, answer = (_text(item, name, where) if name else "" for name in (kind.text, kind.answer))
                turns.history.append(Turn(instruction + text, answer, text or answer))
    return list(users.values())


def _read(path: Path, kind: type[T]) -> T:
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}. Name a file of LaMP") from None
    except ValidationError as error:
        raise InputError(f"{path} is not a file of LaMP: {first_problem(error)}. Name another") from None


def _kind_of(entry: _Entry, where: str) -> _Kind:
    if not entry.profile:
        raise InputError(f"{where}: the profile is empty. Remove the entry")
    fields = entry.profile[0].keys()
    if {"title", "abstract"} <= fields and not any("paper: " in query.input for query in entry.query):
        return _CITATION
    found = next((kind for kind in _KINDS if {kind.text or kind.answer, kind.answer} <= fields), None)
    if found is None:
        raise InputError(f"{where}: the profile has the fields {', '.join(fields)}, which match no task of LaMP")
    return found


def _text(item: dict[str, object], name: str, where: str) -> str:
    value = item.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise InputError(f"{where}: {name} = {value!r} is not a text or a number. Repair the profile")
    return str(value).strip()


def require_retrieval() -> None:
    """Raise InputError if bm25s is not installed."""
    if find_spec("bm25s") is None:
        raise InputError("--retrieve needs bm25s, which is not installed. Run pip install 'pst-ds[retrieval]'")


def rows_of(turns: UserTurns, *, retrieve: int, profile: bool) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows of a user's history, and of the queries: {"user", "prompt", "completion"}.

    Each prompt starts with up to ``retrieve`` earlier turns, the most similar last, and with ``profile`` also the
    frequency of each answer. Turns of the history see only earlier turns; queries see all.
    """
    nearest = _Nearest([f"{turn.text} {turn.answer}" for turn in turns.history]) if retrieve else None

    def row(turn: Turn, before: int) -> dict[str, str]:
        lines = [profile_of(turns.history[:before])] if profile else []
        if nearest is not None:
            lines += [_line(turns.history[i]) for i in reversed(nearest.to(turn.text, retrieve, before))]
        prompt = "\n".join([*filter(None, lines), turn.request])
        return {"user": turns.user, "prompt": prompt, "completion": turn.answer}

    history = [row(turn, i) for i, turn in enumerate(turns.history)]
    return history, [row(turn, len(turns.history)) for turn in turns.queries]


def profile_of(history: Sequence[Turn]) -> str:
    """Return the frequency of each answer of a user, the most frequent first; "" if most answers differ."""
    counts = Counter(turn.answer for turn in history)
    if not counts or len(counts) > len(history) / 2:
        return ""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_ANSWERS]
    return "Answers so far: " + ", ".join(f"{answer} {count}" for answer, count in ranked)


class _Nearest:
    """BM25 index of one user's texts."""

    def __init__(self, texts: Sequence[str]):
        import bm25s

        words = [text.lower().split() for text in texts]
        self._index = bm25s.BM25() if any(words) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

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
