"""LaMP's files as they are, and users' own history in front of their requests."""

from __future__ import annotations

import json

import pytest

from pst_ds.cli.main import main
from pst_ds.data.lamp import MOST_CHARACTERS, Turn, UserTurns, profile_of, read_lamp, rows_of
from pst_ds.errors import InputError

MOVIES = "Which tag does this movie relate to? Just answer with the tag name. tags: [comedy, action] description: "
RATING = "What is the score of the following review on a scale of 1 to 5? just answer with 1 to 5. review: "


def _files(top, entries, golds=None):
    (top / "questions.json").write_text(json.dumps(entries))
    if golds is None:
        return top / "questions.json", None
    table = {"task": "LaMP", "golds": [{"id": key, "output": value} for key, value in golds.items()]}
    (top / "outputs.json").write_text(json.dumps(table))
    return top / "questions.json", top / "outputs.json"


def _movies(*texts):
    return [{"id": str(i), "description": text, "tag": "comedy"} for i, text in enumerate(texts)]


def test_a_split_and_its_answers(tmp_path):
    entries = [
        {"id": "10", "input": f"{MOVIES}a dog laughs", "profile": _movies("a cat laughs")},
        {"id": "11", "input": f"{RATING}fine", "profile": [{"id": "a", "text": "bad", "score": "1"}]},
    ]
    ann, bob = read_lamp(*_files(tmp_path, entries, {"10": "comedy", "11": "5"}))
    assert (ann.user, ann.queries) == ("10", [Turn(f"{MOVIES}a dog laughs", "comedy", "a dog laughs")])
    assert ann.history == [Turn(f"{MOVIES}a cat laughs", "comedy", "a cat laughs")]
    assert bob.history == [Turn(f"{RATING}bad", "1", "bad")]


@pytest.mark.parametrize(
    ("request_text", "item", "past"),
    [
        ("Which category? categories: [a, b] article: X", {"text": "T", "category": "a", "title": "H"},
         Turn("Which category? categories: [a, b] article: T", "a", "T")),
        ("Generate a headline for the following article: X", {"text": "T", "title": "H"},
         Turn("Generate a headline for the following article: T", "H", "T")),
        ("Generate a title for the following abstract of a paper: X", {"title": "H", "abstract": "A"},
         Turn("Generate a title for the following abstract of a paper: A", "H", "A")),
        ("Paraphrase the following tweet without any explanation before or after it: X", {"text": "T"},
         Turn("Write a tweet", "T", "T")),
        ("For an author who has written X, which reference is related? [1] or [2]", {"title": "H", "abstract": "A"},
         Turn("Write the abstract of a paper of yours: H", "A", "H")),
    ],
)  # fmt: skip
def test_the_past_of_every_task_has_the_form_of_its_queries(tmp_path, request_text, item, past):
    entries = [{"id": "1", "input": request_text, "profile": [item]}]
    (user,) = read_lamp(*_files(tmp_path, entries, {"1": "[1]"}))
    assert user.history == [past]


def test_one_file_of_users_with_dates(tmp_path):
    past = [{"text": "late", "score": 5, "date": "2020-02-01"}, {"text": "early", "score": 1, "date": "2019-01-01"}]
    asked = [{"id": "a", "input": f"{RATING}x", "gold": "3"}, {"id": "b", "input": f"{RATING}y", "gold": 4}]
    (user,) = read_lamp(*_files(tmp_path, [{"user_id": 7, "profile": past, "query": asked}]))
    assert user.user == "7"
    assert [turn.text for turn in user.history] == ["early", "late"]
    assert [turn.answer for turn in user.queries] == ["3", "4"]


@pytest.mark.parametrize(
    ("entries", "golds", "message"),
    [
        ({}, {}, "Input should be a valid array"),
        ([{"id": "1", "input": "x"}], {}, "'0.profile' is missing"),
        ([{"id": "1", "input": "x", "profile": []}], {"1": "a"}, "profile is empty"),
        ([{"id": "1", "input": "x", "profile": [{"tex": "x"}]}], {"1": "a"}, "match no task of LaMP"),
        ([{"id": "1", "input": "x", "profile": _movies("x")}], {"2": "a"}, "question '1' has no answer"),
        ([{"id": "1", "input": None, "profile": _movies("x")}], {"1": "a"}, "input = .None"),
        ([{"id": "1", "input": "x", "profile": _movies("")}], {"1": "a"}, "description = ''"),
    ],
)
def test_what_is_wrong_is_one_message(tmp_path, entries, golds, message):
    with pytest.raises(InputError, match=message):
        read_lamp(*_files(tmp_path, entries, golds))


def _turns(*pairs):
    return [Turn(f"rate: {text}", answer, text) for text, answer in pairs]


def test_the_nearest_of_the_own_past_come_first_to_last_and_none_from_later():
    pytest.importorskip("bm25s")
    past = _turns(("red car", "4"), ("green tree", "1"), ("a red fast car", "5"), ("blue sea", "2"))
    history, (query,) = rows_of(UserTurns("u", past, _turns(("fast car", "?"))), retrieve=2, profile=False)
    assert query["prompt"] == "red car => 4\na red fast car => 5\nrate: fast car"
    assert [row["prompt"].count("\n") for row in history] == [0, 0, 1, 0]
    assert history[2] == {"user": "u", "prompt": "red car => 4\nrate: a red fast car", "completion": "5"}


def test_a_profile_counts_answers_that_came_before():
    past = _turns(("a", "4"), ("b", "4"), ("c", "1"), ("d", "4"))
    history, (query,) = rows_of(UserTurns("u", past, _turns(("e", "?"))), retrieve=0, profile=True)
    assert query["prompt"] == "Answers so far: 4 3, 1 1\nrate: e"
    assert history[0]["prompt"] == "rate: a"
    assert profile_of(_turns(("a", "x"), ("b", "y"))) == ""


def test_a_history_of_one_long_text_and_none():
    pytest.importorskip("bm25s")
    past = _turns(("word " * 1000, "4"))
    _, (query,) = rows_of(UserTurns("u", past, _turns(("word", "?"))), retrieve=3, profile=False)
    assert len(query["prompt"]) < MOST_CHARACTERS + 50
    assert rows_of(UserTurns("u", [], _turns(("word", "?"))), retrieve=3, profile=True)[1][0]["prompt"] == "rate: word"


def test_the_verb_writes_rows_that_users_train_reads(tmp_path, capsys):
    pytest.importorskip("bm25s")
    entries = [{"id": str(i), "input": f"{MOVIES}a dog", "profile": _movies("a dog", "a cat")} for i in range(3)]
    questions, answers = _files(tmp_path, entries, {str(i): "comedy" for i in range(3)})
    words = ["users", "rows", str(questions), "--answers", str(answers), "--out", str(tmp_path / "rows")]
    assert main([*words, "--retrieve", "1", "--profile", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["users"], facts["history"], facts["queries"]) == (3, 6, 3)
    rows = [json.loads(line) for line in (tmp_path / "rows" / "queries.jsonl").read_text().splitlines()]
    prompt = f"Answers so far: comedy 2\na dog => comedy\n{MOVIES}a dog"
    assert rows[0] == {"user": "0", "prompt": prompt, "completion": "comedy"}
    assert main([*words, "--retrieve", "-1"]) == 2
    assert "--retrieve -1" in capsys.readouterr().err
