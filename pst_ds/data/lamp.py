"""Read LaMP files (arXiv 2304.11406): each user's history and queries.

    questions   [{"id": ..., "input": the request, "profile": [{"id": ..., "text": ..., a field of the answer: ...}]}]
    answers     {"golds": [{"id": ..., "output": ...}]}

A file with both, with one entry per user, is also read: {"user_id", "profile", "query": [{"id", "input", "gold"}]}. The
fields of the profile determine the task.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst_ds.errors import InputError

JsonTable = dict[str, Any]


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
    """A task of LaMP: the start of a query's text, and the corresponding fields of the profile."""

    text: str
    answer: str
    marks: tuple[str, ...] = ()
    """Marks before a query's text; everything up to the mark is the instruction, also used for the history."""
    instruction: str = ""
    """Instruction of the history, if its requests differ from the queries."""


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
    entries = _json(questions, list)
    golds: dict[str, str] = {}
    if answers is not None:
        golds = {str(gold["id"]): str(gold["output"]) for gold in _golds(answers)}
    users: dict[str, UserTurns] = {}
    for number, entry in enumerate(entries):
        where = f"{questions}: entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("profile"), list):
            raise InputError(f"{where} has no list named profile. Name a questions file of LaMP")
        user = str(entry.get("user_id", entry.get("id", number)))
        asked = [(_text(query, "input", where), _answer(query, golds, where)) for query in _queries(entry, where)]
        kind = _kind_of(entry["profile"], asked, where)
        turns = users.setdefault(user, UserTurns(user))
        split = [_split(request, kind) for request, _ in asked]
        turns.queries += [
            Turn(request, answer, text) for (request, answer), (_, text) in zip(asked, split, strict=True)
        ]
        if not turns.history:
            instruction = kind.instruction or next((before for before, _ in split if before), "")
            turns.history = [_past(item, kind, instruction, where) for item in _in_order(entry["profile"])]
    return list(users.values())


def _queries(entry: JsonTable, where: str) -> list[JsonTable]:
    queries = entry.get("query", [entry])
    if not isinstance(queries, list) or not all(isinstance(query, dict) for query in queries):
        raise InputError(f"{where}: query is not a list of tables with input and gold")
    return queries


def _answer(query: JsonTable, golds: dict[str, str], where: str) -> str:
    found = golds.get(str(query.get("id")), query.get("gold"))
    if found is None:
        raise InputError(
            f"{where}: question {query.get('id')!r} has no answer. Name LaMP's outputs file of the same split"
        )
    return str(found)


def _kind_of(profile: list[JsonTable], asked: list[tuple[str, str]], where: str) -> _Kind:
    if not profile or not all(isinstance(item, dict) for item in profile):
        raise InputError(f"{where}: the profile is empty, or not a list of tables")
    fields = profile[0].keys()
    if {"title", "abstract"} <= fields and not any("paper: " in request for request, _ in asked):
        return _CITATION
    found = next((kind for kind in _KINDS if {kind.text or kind.answer, kind.answer} <= fields), None)
    if found is None:
        raise InputError(f"{where}: the profile has the fields {', '.join(fields)}, which match no task of LaMP")
    return found


def _split(request: str, kind: _Kind) -> tuple[str, str]:
    """Return (instruction, text) of a query."""
    for mark in kind.marks:
        place = request.find(mark)
        if place >= 0:
            return request[: place + len(mark)], request[place + len(mark) :]
    return "", request


def _past(item: JsonTable, kind: _Kind, instruction: str, where: str) -> Turn:
    text = _text(item, kind.text, where) if kind.text else ""
    answer = _text(item, kind.answer, where)
    return Turn(instruction + text, answer, text or answer)


def _in_order(profile: list[JsonTable]) -> list[JsonTable]:
    """Return the items, sorted by date if all have one."""
    if all("date" in item for item in profile):
        return sorted(profile, key=lambda item: str(item["date"]))
    return profile


def _text(table: JsonTable, name: str, where: str) -> str:
    value = table.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise InputError(f"{where}: {name} = {value!r} must be a text or a number")
    return str(value).strip()


def _golds(path: Path) -> list[JsonTable]:
    golds = _json(path, dict).get("golds")
    if not isinstance(golds, list) or not all(
        isinstance(gold, dict) and {"id", "output"} <= gold.keys() for gold in golds
    ):
        raise InputError(f"{path} has no golds with id and output, as LaMP's outputs files have")
    return golds


def _json(path: Path, kind: type) -> Any:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, kind):
        raise InputError(f"{path} does not hold a JSON {'list' if kind is list else 'table'}, as LaMP's files do")
    return found
