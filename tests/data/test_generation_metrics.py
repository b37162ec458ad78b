"""Scores of texts with several references, against other implementations and their definitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pst_ds.config.run import ConfigError
from pst_ds.data.generation import require_text_metrics, text_metrics
from tests.lazy_module import lazy_module

nltk = lazy_module("nltk")

TEXTS = ["the cat sat on the old mat today", "a dog ran over the green hill", "birds sing in the early morning light"]
REFERENCES = [
    ["the cat sat on a mat", "on the old mat sat the cat today"],
    ["a dog ran quickly over the hill"],
    ["birds sing in the morning", "early birds sing in the light", "in the early morning light birds sing"],
]
_words = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=8)


def test_bleu_is_that_of_the_corpus_with_all_references():
    references = [[text.split() for text in texts] for texts in REFERENCES]
    expected = nltk.translate.bleu_score.corpus_bleu(references, [text.split() for text in TEXTS])
    assert text_metrics(TEXTS, REFERENCES)["bleu"] == pytest.approx(100 * expected)


def _longest(one, other):
    """Length of the longest common subsequence."""
    rows = [[0] * (len(other) + 1)]
    for x in one:
        rows.append([0])
        for j, y in enumerate(other):
            rows[-1].append(rows[-2][j] + 1 if x == y else max(rows[-2][j + 1], rows[-1][j]))
    return rows[-1][-1]


@given(st.lists(st.tuples(_words, st.lists(_words, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_rouge_l_is_the_f1_of_the_best_reference(examples):
    best = []
    for text, references in examples:
        common = [(2 * _longest(text, wanted)) / (len(text) + len(wanted)) for wanted in references]
        best.append(max(common))
    found = text_metrics([" ".join(t) for t, _ in examples], [[" ".join(r) for r in rs] for _, rs in examples])
    assert found["rouge_l"] == pytest.approx(100 * sum(best) / len(best))


def test_a_text_that_is_one_of_the_references_is_perfect():
    found = text_metrics([REFERENCES[0][1], REFERENCES[1][0], REFERENCES[2][2]], REFERENCES)
    assert found == dict.fromkeys(("bleu", "rouge_1", "rouge_l", "chrf"), pytest.approx(100))
    assert text_metrics(["", "", ""], REFERENCES) == dict.fromkeys(("bleu", "rouge_1", "rouge_l", "chrf"), 0.0)
    of_words = text_metrics(["end the was"], [["the end was"]])
    assert of_words["rouge_1"] == pytest.approx(100)
    assert of_words["rouge_l"] < 99


def test_chrf_is_the_f2_of_character_n_grams():
    text, wanted = "abcab", "abcb"
    precision, recall = [], []
    for n in range(1, 5):  # longer ones are in neither, or in one alone
        ours, theirs = ([t[i : i + n] for i in range(len(t) - n + 1)] for t in (text, wanted))
        common = sum(min(ours.count(gram), theirs.count(gram)) for gram in set(ours))
        precision.append(common / len(ours))
        recall.append(common / len(theirs))
    p, r = sum(precision) / 4, sum(recall) / 4
    assert text_metrics([text], [[wanted]])["chrf"] == pytest.approx(100 * 5 * p * r / (4 * p + r))


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("pst_ds.data.generation.find_spec", lambda name: None if name == "rouge_score" else name)
    with pytest.raises(ConfigError, match=r"scored with rouge_score, which .* pip install 'pst-ds\[nlg\]'"):
        require_text_metrics()
