"""Reading text classification data."""

from __future__ import annotations

import csv
import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from pst_ds.config.run import ConfigError, DataConfig
from pst_ds.data import labelled
from pst_ds.data.labelled import Examples, collate, label_names, load_examples, read_labelled
from tests.pairs import every_pair

ROWS = [
    ("a warm and moving film", "good"),
    ('the plot, as "told", is tired', "bad"),
    ("tired cast\tand flat scene", "bad"),
    ("NA", "good"),
    ("null", "None"),
]
PAIRS = [("a warm film", "the plot is tired", 1), ("flat scene", "flat scene", 0)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("tests/data/tiny-bert")


def _write(path, columns, rows):
    """``rows`` in the format of the file's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_dict({c: [row[i] for row in rows] for i, c in enumerate(columns)}).to_parquet(path)
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [columns, *rows]))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    return str(path)


def _data(path, **settings):
    return DataConfig(**{"train": str(path), "max_length": 32, **settings})


def _refusal(call, *arguments):
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet", "CSV"])
def test_every_format_reads_the_same(tmp_path, tokenizer, ending):
    path = tmp_path / f"rows.{ending.lower()}"
    rows = ROWS if ending != "tsv" else [(text.replace("\t", " "), label) for text, label in ROWS]
    if ending == "json":
        path.write_text(json.dumps([{"text": text, "label": label} for text, label in rows]))
    else:
        _write(path, ("text", "label"), rows)
    path = path.rename(tmp_path / f"rows.{ending}")
    data = _data(path)
    names = label_names(data)
    assert names == ["None", "bad", "good"]
    examples = load_examples(data, "train", tokenizer, names)
    assert examples.labels == [2, 1, 1, 2, 0]
    assert [f["input_ids"] for f in examples.features] == [tokenizer(text)["input_ids"] for text, _ in rows]
    assert examples.lengths == [len(tokenizer(text)["input_ids"]) for text, _ in rows]
    assert len(examples) == 5


def test_quotes_of_a_tsv_are_characters_like_others(tmp_path):
    """As in the files of GLUE: one that begins a field does not run on to the next."""
    texts = ["fine film", '"Quiet, he said', "another one", 'and "more" here', '"Loud," she said.', 'a ""b"" c', '"d"']
    path = _write(tmp_path / "rows.tsv", ("text", "label"), [(text, i % 2) for i, text in enumerate(texts)])
    rows = read_labelled(_data(path), "train")
    assert rows["text"][:] == texts
    assert rows["label"][:] == ["0", "1", "0", "1", "0", "1", "0"]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC, csv.QUOTE_ALL])
def test_a_tsv_that_was_written_with_quotes_is_refused(tmp_path, quoting):
    path = tmp_path / "rows.tsv"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting).writerows([("text", "label"), ('a "b" c', 1), ("d", 0)])
    message = _refusal(label_names, _data(path))
    assert message.startswith(f"{path} was written with quotes around its ")
    assert "Save it without them, or as .csv or .jsonl" in message
    path.write_text('text\tlabel\n"a b"\t1\n"c d"\t0\n')  # every value of a column
    assert "quotes around" in _refusal(label_names, _data(path))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_pairs_of_texts_are_told_apart(tmp_path, tokenizer, ending):
    path = _write(tmp_path / f"pairs.{ending}", ("premise", "hypothesis", "label"), PAIRS)
    data = _data(path, text_columns=("premise", "hypothesis"))
    names = label_names(data)
    assert names == ["0", "1"]
    examples = load_examples(data, "train", tokenizer, names)
    assert examples.labels == [1, 0]
    first = tokenizer(PAIRS[0][0], PAIRS[0][1])
    assert examples.features[0]["input_ids"] == first["input_ids"]
    assert examples.features[0]["token_type_ids"] == first["token_type_ids"]
    assert set(examples.features[0]["token_type_ids"]) == {0, 1}
    swapped = load_examples(_data(path, text_columns=("hypothesis", "premise")), "train", tokenizer, names)
    assert swapped.features[0]["input_ids"] != examples.features[0]["input_ids"]


def test_texts_are_cut_to_max_length(tmp_path, tokenizer):
    path = _write(tmp_path / "rows.jsonl", ("text", "label"), [("film " * 40, "a"), ("film", "b")])
    examples = load_examples(_data(path, max_length=8), "train", tokenizer, ["a", "b"])
    assert examples.lengths == [8, len(tokenizer("film")["input_ids"])]


def test_labels_are_in_their_own_order_whatever_the_order_of_rows(tmp_path, tokenizer):
    path = _write(tmp_path / "rows.jsonl", ("text", "label"), [("film", i) for i in (10, 2, 0, 10)])
    assert label_names(_data(path)) == ["0", "2", "10"]  # as numbers, not as text
    assert load_examples(_data(path), "train", tokenizer, ["0", "2", "10"]).labels == [2, 1, 0, 2]
    path = _write(tmp_path / "words.jsonl", ("text", "label"), [("film", i) for i in ("10", "2", "a")])
    assert label_names(_data(path)) == ["10", "2", "a"]


def test_the_order_of_the_classes_can_be_named(tmp_path, tokenizer):
    path = _write(tmp_path / "rows.jsonl", ("text", "label"), [("film", name) for name in ("same", "not_same")])
    data = _data(path, label_names=("not_same", "same"))
    assert label_names(data) == ["not_same", "same"]
    assert load_examples(data, "train", tokenizer, label_names(data)).labels == [1, 0]
    encoded = _data(
        _class_labels(tmp_path / "rows.parquet", ["not_same", "same"], [0, 1]), label_names=data.label_names
    )
    turned = _data(encoded.train, label_names=("same", "not_same"))
    assert (label_names(encoded), label_names(turned)) == (["not_same", "same"], ["same", "not_same"])
    assert load_examples(turned, "train", tokenizer, label_names(turned)).labels == [1, 0]
    ids = _write(tmp_path / "ids.jsonl", ("text", "label"), [("film", i) for i in (1, 0)])
    assert label_names(_data(ids, label_names=data.label_names)) == ["0", "1"]  # as in GLUE's own files
    message = _refusal(label_names, _data(path, label_names=("same", "notsame")))
    assert message.startswith("data.label_names = ['same', 'notsame']")
    assert "labels not_same, same. Name exactly these, or none" in message
    with pytest.raises(ConfigError, match=r"data\.label_names = \['a', 'a'\] must be different names"):
        _data(path, label_names=("a", "a"))


def test_a_class_label_keeps_the_dataset_s_order(tmp_path, tokenizer):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["world", "art", "none"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows.to_parquet(tmp_path / "rows.parquet")
    data = _data(tmp_path / "rows.parquet")
    assert label_names(data) == ["world", "art", "none"]
    assert load_examples(data, "train", tokenizer, ["world", "art", "none"]).labels == [1, 0]


def _class_labels(path, names, labels):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict({"text": ["film"] * len(labels), "label": labels}, features=features).to_parquet(path)
    return str(path)


def test_a_split_s_own_names_are_read_as_those_of_training(tmp_path, tokenizer):
    """Files whose columns were encoded one by one have other ids for the same names."""
    train = _class_labels(tmp_path / "train.parquet", ["bad", "good", "ugly"], [0, 1, 2])
    words = _write(tmp_path / "train.jsonl", ("text", "label"), [("film", n) for n in ("ugly", "bad", "good")])
    validation = _class_labels(tmp_path / "validation.parquet", ["good", "ugly"], [0, 1, 0])
    for path in (train, words):
        data = _data(path, validation=validation)
        assert load_examples(data, "validation", tokenizer, label_names(data)).labels == [1, 2, 1]
    back = _data(validation, validation=words)
    assert "label 'bad' in line 2 is not one of the training labels good, ugly" in _refusal(
        load_examples, back, "validation", tokenizer, label_names(back)
    )


WORDS = ("the", "plot", "was", "a", "warm", "and", "moving", "story", "unbelievably", "vague", "ctenophore", "film")


def _long(seed, count):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(count))


@every_pair
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("folder", ["tests/data/tiny-bert", "tests/data/tiny-llama"])
def test_a_long_pair_is_cut_as_if_tokenised_whole(tmp_path, folder, side):
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side=side)
    sizes = [(300, 3), (3, 300), (300, 290), (290, 300), (45, 44), (16, 300), (1, 1)]
    pairs = [(_long(i, first), _long(~i, second), i % 2) for i, (first, second) in enumerate(sizes)]
    path = _write(tmp_path / "pairs.jsonl", ("premise", "hypothesis", "label"), pairs)
    data = DataConfig(train=path, text_columns=("premise", "hypothesis"), max_length=32)
    whole = tokenizer([pair[0] for pair in pairs], [pair[1] for pair in pairs], truncation=True, max_length=32)
    found = load_examples(data, "train", tokenizer, ["0", "1"]).features
    assert found == [{key: values[i] for key, values in whole.items()} for i in range(len(pairs))]


def test_long_pairs_reach_the_tokenizer_short_and_few_at_a_time(tmp_path, tokenizer, monkeypatch):
    """Of two texts of 10,000 tokens it would make 100,000 pieces for every example, and hold those of all rows."""
    pairs = [(_long(1, 5000), _long(2, 5000), i % 2) for i in range(5)]
    path = _write(tmp_path / "pairs.jsonl", ("premise", "hypothesis", "label"), pairs)
    data = DataConfig(train=path, text_columns=("premise", "hypothesis"), max_length=32)
    pieces = []

    def counting(*texts, **options):
        encoded = AutoTokenizer.from_pretrained("tests/data/tiny-bert")(*texts, **options)
        if len(texts) == 2:
            pieces.append([1 + len(encoding.overflowing) for encoding in encoded.encodings])
        return encoded

    counting.is_fast, counting.truncation_side = True, "right"
    monkeypatch.setattr(labelled, "_ROWS_AT_A_TIME", 2)
    assert len(load_examples(data, "train", counting, ["0", "1"]).features) == 5
    assert [len(of_call) for of_call in pieces] == [2, 2, 1]
    assert max(map(max, pieces)) < 80


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([0, 2], "label 'ugly' in row 1 is not one of the training labels bad, good"),
        ([0, -1], "label -1 in row 1 stands for a hidden label"),
        ([0, None], "label None in row 1 is not one of the training labels bad, good"),
    ],
)
def test_a_class_label_that_training_lacks_is_refused(tmp_path, labels, reason):
    train = _class_labels(tmp_path / "train.parquet", ["bad", "good"], [0, 1])
    data = _data(train, validation=_class_labels(tmp_path / "validation.parquet", ["bad", "good", "ugly"], labels))
    assert reason in _refusal(load_examples, data, "validation", None, label_names(data))


def test_a_missing_file_names_the_setting_and_where_it_looked(tmp_path):
    message = _refusal(label_names, _data(tmp_path / "nothere.csv"))
    assert message.startswith("data.train = ")
    assert f"does not exist (looked in {tmp_path}/nothere.csv)" in message
    assert "data.validation is not set" in _refusal(load_examples, _data("x.csv"), "validation", None, ["a", "b"])


def test_an_unknown_ending_lists_the_known(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    message = _refusal(label_names, _data(tmp_path / "rows.xlsx"))
    assert "ends in '.xlsx'. Use one of .jsonl, .json, .csv, .tsv, .parquet" in message


@pytest.mark.parametrize(
    ("ending", "content", "reason"),
    [("jsonl", "{not json\n", "line 1 is not a JSON object"), ("parquet", "not parquet", "cannot be read as parquet")],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path, ending, content, reason):
    path = tmp_path / f"rows.{ending}"
    path.write_text(content)
    message = _refusal(label_names, _data(path))
    assert str(path) in message
    assert reason in message
    assert "\n" not in message


def test_a_missing_column_names_setting_and_columns(tmp_path, tokenizer):
    path = _write(tmp_path / "rows.csv", ("text", "label"), ROWS)
    message = _refusal(label_names, _data(path, label_column="class"))
    assert f"{path} has no column 'class', which data.label_column names. Columns: text, label" in message
    assert "has no column 'body', which data.text_columns" in _refusal(label_names, _data(path, text_columns=("body",)))
    validation = _write(tmp_path / "validation.csv", ("text", "class"), ROWS)
    message = _refusal(load_examples, _data(path, validation=validation), "validation", tokenizer, ["bad", "good"])
    assert f"{validation} has no column 'label'" in message


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("film", 0.5), ("plot", 1.0)], "holds fractions, which is regression"),
        ([("film", None), ("plot", "a"), ("cast", "b")], "has empty values, in line 1. Give every example a label"),
        ([("film", "c"), ("plot", ""), ("cast", "")], "has empty values, in line 2 and 1 more. Give every"),
        ([("film", None), ("plot", 1), ("cast", 0)], "has empty values, in line 1. Give every example a label"),
        ([("film", "a"), ("plot", "a")], "has 1 class, but at least 2 are needed"),
        ([("film", ["a", "b"]), ("plot", ["a"])], "holds a list in line 1, not a plain text"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, rows, reason):
    path = _write(tmp_path / "rows.jsonl", ("text", "label"), rows)
    message = _refusal(label_names, _data(path))
    assert message.startswith(f"{path}: column 'label'")
    assert reason in message


def test_an_empty_label_of_a_csv_is_refused_among_numbers_too(tmp_path):
    path = _write(tmp_path / "rows.csv", ("text", "label"), [("film\nnoir", 1), ("plot", ""), ("cast", 0)])
    assert "has empty values, in line 4" in _refusal(label_names, _data(path))


@pytest.mark.parametrize("other", ["cafe\u0301", "caf\u200b\u00e9", "\ufeffcaf\u00e9"])
def test_classes_that_look_the_same_are_refused(tmp_path, other):
    """An accent as a character of its own, as macOS writes it, or a character without width, from a web page."""
    cafe = "caf\u00e9"
    path = _write(tmp_path / "rows.csv", ("text", "label"), [("film", "bad"), ("plot", cafe), ("cast", other)])
    message = _refusal(label_names, _data(path))
    words = f"has the classes {cafe!a} and {other!a}, which look the same, in line 4. Write each class"
    assert words in message


def test_classes_that_differ_in_white_space_only_are_refused(tmp_path):
    """A space too many in some rows would otherwise train a class more without a word."""
    path = _write(tmp_path / "rows.csv", ("text", "label"), [("a", "good"), ("b", "bad"), ("c", "good ")])
    message = _refusal(label_names, _data(path))
    assert message.startswith(f"{path}: column 'label' has the classes 'good' and 'good '")
    assert message.endswith("in line 4. Write each class in one way")


def test_a_label_of_white_space_is_empty(tmp_path):
    path = _write(tmp_path / "rows.csv", ("text", "label"), [("a", "good"), ("b", "bad"), ("c", "  ")])
    assert "has empty values, in line 4. Give every example a label" in _refusal(label_names, _data(path))


def test_an_empty_file_is_refused(tmp_path):
    path = _write(tmp_path / "rows.csv", ("text", "label"), [])
    message = _refusal(label_names, _data(path))
    assert path in message
    assert "has no examples" in message


def test_a_missing_text_is_refused_and_an_empty_one_is_a_text(tmp_path, tokenizer):
    path = _write(tmp_path / "rows.jsonl", ("text", "label"), [("film", "a"), (None, "b")])
    message = _refusal(load_examples, _data(path), "train", tokenizer, ["a", "b"])
    assert message.startswith(f"{path}: column 'text' has no text in line 2")
    for ending in ("jsonl", "csv"):
        path = _write(tmp_path / f"empty.{ending}", ("text", "label"), [("film", "a"), ("", "b")])
        examples = load_examples(_data(path), "train", tokenizer, ["a", "b"])
        assert examples.features[1]["input_ids"] == tokenizer("")["input_ids"]


def test_bytes_of_a_parquet_file_are_not_a_text(tmp_path, tokenizer):
    import datasets

    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": ["film", "plot"], "label": ["a", "b"]}).cast_column(
        "text", datasets.Value("binary")
    ).to_parquet(path)
    message = _refusal(load_examples, _data(path), "train", tokenizer, ["a", "b"])
    assert message.startswith(f"{path}: column 'text' has bytes in row 0")


def test_a_label_that_training_never_saw_is_refused_with_its_line(tmp_path, tokenizer):
    train = _write(tmp_path / "train.csv", ("text", "label"), [("film", "good"), ("plot", "bad")])
    validation = _write(tmp_path / "validation.csv", ("text", "label"), [("film", "good"), ("plot", "soso")])
    data = _data(train, validation=validation)
    message = _refusal(load_examples, data, "validation", tokenizer, label_names(data))
    assert message == f"{validation}: label 'soso' in line 3 is not one of the training labels bad, good"


def test_a_hub_dataset_out_of_reach_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = DataConfig(train="train", dataset="pst-ds/no-such-dataset")
    message = _refusal(label_names, data)
    assert message.startswith("data.dataset = 'pst-ds/no-such-dataset', split 'train', cannot be loaded: ")
    assert "\n" not in message


def test_collate_pads_to_the_longest(tokenizer):
    texts = ["film", "a warm and moving film"]
    features = [dict(tokenizer(text)) for text in texts]
    batch = collate(Examples(features, [1, 0]), [1, 0], tokenizer)
    long, short = (len(f["input_ids"]) for f in reversed(features))
    assert batch["input_ids"].shape == (2, long)
    assert batch["attention_mask"].sum(1).tolist() == [long, short]
    assert batch["labels"].tolist() == [0, 1]
    assert torch.equal(batch["input_ids"][0], torch.tensor(features[1]["input_ids"]))
