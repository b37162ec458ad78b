"""Data as a line of text, and pairs of data and text as model inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst_ds.config.data import EvalConfig
from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data.tasks.data_to_text import IGNORED, DataToText, Pairs, linearize

TOKENIZER = AutoTokenizer.from_pretrained("tests/data/tiny-llama")
TASK = DataToText(EvalConfig())
START, END = 1, 2
_tokens = st.lists(st.integers(3, 30), max_size=20)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("name[The Vaults], eatType[pub]", "name : The Vaults | eatType : pub"),
        ("name[The Vaults]", "name : The Vaults"),
        ("customer rating[5 out of 5], near[Café, north],", "customer rating : 5 out of 5 | near : Café, north"),
        ("price[£20-25],name[Wok]", "price : £20-25 | name : Wok"),
        ("see [1] and [2]", "see [1] and [2]"),  # brackets of another kind
        ("  a text\n", "a text"),
        (["A_b | height | 3.5 (m)", "A_b | isPartOf | C"], "A_b : height : 3.5 (m) | A_b : isPartOf : C"),
        ([["A | b | C", "D | e | F", "G | h | I"], ["another | set | here"]], "A : b : C | D : e : F | G : h : I"),
        ([["Mars Hill", "JOINED", "1973"], ["[T]", "Has Part", "x"]], "Mars Hill : joined : 1973 | [T] : has part : x"),
        ([["a", "b"]], None),
        ([["a", "b", "c"], ["a", "b"]], None),
        ("", None), ([], None), ([[]], None), (None, None), (3, None), ([1, 2], None),
    ],
)  # fmt: skip
def test_data_as_a_line(value, line):
    assert linearize(value) == line


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_texts_in_objects_are_refused(tmp_path, alone, ending):
    """A path that ends too early, "lex" for WebNLG's "lex.text": objects were trained on as Python prints them."""
    import datasets

    path = tmp_path / f"rows.{ending}"
    rows = datasets.Dataset.from_list([{"data": "name[Ann]", "lex": [{"lang": "en", "text": "Ann"}]}])
    if ending == "jsonl":
        rows.to_json(path)
    else:
        rows.to_parquet(path)
    data = DataConfig(train=str(path), text_columns=("data",), label_column="lex", max_length=16)
    place = {"jsonl": "line 1", "parquet": "row 0"}[ending]
    words = rf"column 'lex' has an object in {place}, not a text. Name a part of it, such as 'lex\.lang'"
    with pytest.raises(ConfigError, match=words):
        TASK.load(data, "train", TOKENIZER, [])


def _pairs(inputs, targets, max_length, separator=(END,)):
    """One example for each input and target."""
    n = len(targets)
    return Pairs(list(inputs), [["x"]] * n, list(range(n)), [[*t, END] for t in targets], list(separator), max_length)


@given(_tokens, _tokens, st.integers(4, 40), st.lists(st.integers(31, 34), min_size=1, max_size=1))
def test_a_pair_fits_and_the_data_is_cut_first(data, target, max_length, separator):
    pairs = _pairs([data], [target], max_length, separator)
    prompt, text = pairs.tokens(0)
    assert len(prompt) + len(text) == min(max_length, pairs.lengths[0]) == pairs.lengths[0]
    assert prompt[-1:] == separator
    assert data[: len(prompt) - 1] == prompt[:-1]
    assert [*target, END][: len(text)] == text
    whole = len(data) + 1 + len(target) + 1
    if whole <= max_length:
        assert len(prompt) + len(text) == whole
    elif len(text) < len(target) + 1:  # then the data has no more than half
        assert len(prompt) <= max(max_length // 2, 1)
        assert len(prompt) + len(text) == max_length


@given(_tokens, st.integers(4, 40), st.integers(2, 40))
def test_a_prompt_is_data_and_separator(data, max_length, most):
    (prompt,) = _pairs([data], [[3]], max_length).prompts(most)
    assert prompt == [*data[: min(most, max_length) - 1], END]


@given(st.lists(st.tuples(_tokens, _tokens), min_size=1, max_size=5), st.data())
def test_a_batch_is_padded_on_the_right_and_scored_on_the_text_alone(examples, draw):
    pairs = _pairs(*zip(*examples, strict=True), max_length=16)
    indices = draw.draw(st.lists(st.integers(0, len(examples) - 1), min_size=1, max_size=4))
    batch = TASK.collate(pairs, indices, TOKENIZER)
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)
    for row, i in enumerate(indices):
        prompt, text = pairs.tokens(i)
        real = len(prompt) + len(text)
        assert batch["input_ids"][row, :real].tolist() == prompt + text
        assert batch["attention_mask"][row].tolist() == [1] * real + [0] * (batch["input_ids"].shape[1] - real)
        wanted = [IGNORED] * len(prompt) + text
        assert batch["labels"][row].tolist() == wanted + [IGNORED] * (batch["input_ids"].shape[1] - real)
    assert batch["input_ids"].shape[1] == max(pairs.lengths[i] for i in indices)


def test_the_loss_and_the_outcomes_are_those_of_the_text(tmp_path):
    model = AutoModelForCausalLM.from_pretrained("tests/data/tiny-llama").eval()
    examples = [([4, 5, 6], [7, 8]), ([9], [10, 11, 12, 13]), ([14, 15], [16])]
    pairs = _pairs(*zip(*examples, strict=True), max_length=16)
    batch = TASK.collate(pairs, [0, 1, 2], TOKENIZER)
    task = DataToText(EvalConfig())
    with torch.no_grad():
        out = model(**batch)
        sums, counts = [], []
        for data, target in examples:  # each alone, token by token
            tokens = [*data, END, *target, END]
            chances = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
            first = len(data) + 1
            sums.append(-sum(float(chances[i - 1, tokens[i]]) for i in range(first, len(tokens))))
            counts.append(len(target) + 1)
    outcomes = task.outcomes(out.logits, batch)
    np.testing.assert_allclose(outcomes[:, 0], sums, rtol=1e-5)
    assert outcomes[:, 1].tolist() == counts
    assert float(out.loss) == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    assert task.metrics(outcomes, pairs)["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


@pytest.fixture
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _data(tmp_path, rows, **settings):
    import json

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"mr": mr, "ref": ref}) + "\n" for mr, ref in rows))
    return DataConfig(train=str(path), text_columns=("mr",), label_column="ref", **settings)


@pytest.mark.usefixtures("_own_cache")
def test_data_that_several_texts_tell_stands_once(tmp_path):
    rows = [("plot", "the film"), ("cast", "warm"), ("plot", " dull film ")]
    pairs = TASK.load(_data(tmp_path, rows), "train", TOKENIZER, [])
    assert pairs.references == [["the film", "dull film"], ["warm"]]
    assert pairs.input_of == [0, 0, 1]
    word = TOKENIZER.convert_tokens_to_ids
    assert pairs.inputs == [[START, word("plot")], [START, word("cast")]]
    assert pairs.targets == [[word("the"), word("film"), END], [word("dull"), word("film"), END], [word("warm"), END]]
    assert pairs.separator == [END]
    first = pairs.first(2)
    assert (len(first), first.references) == (2, [["the film", "dull film"]])
    assert pairs.first(3).digest == pairs.digest != first.digest
    other = TASK.load(_data(tmp_path, rows, separator="and the"), "train", TOKENIZER, [])
    assert other.separator == [word("and"), word("the")]
    assert other.digest != pairs.digest


@pytest.mark.usefixtures("_own_cache")
def test_a_row_without_a_text_is_left_out(tmp_path):
    rows = [("plot", ["the film", "", None]), ("cast", []), ("plot", None)]
    pairs = TASK.load(_data(tmp_path, rows), "train", TOKENIZER, [])
    assert pairs.references == [["the film"]]
    with pytest.raises(ValueError, match=r"rows\.jsonl: column 'ref' has no text in any row"):
        TASK.load(_data(tmp_path, rows[1:]), "train", TOKENIZER, [])
