"""Data that a run cannot read, or cannot learn from."""

from __future__ import annotations

from .workshop import Wrong, causal_setting, setting

GOOD = ({"text": "the film was fine", "label": "good"}, {"text": "the plot was vague", "label": "bad"}) * 20


def _train_on(name: str, content: str | bytes, *settings: str):
    """The arguments of a run that trains on a file of that ``content``."""
    return lambda shop: shop.train(f"data.train={shop.file(name, content)}", *settings)


def _rows(*rows: dict, settings: tuple[str, ...] = ()):
    return lambda shop: shop.train(f"data.train={shop.rows('train.jsonl', *rows)}", *settings)


_CHAT = (
    "task=chat", "model.path=tests/data/tiny-llama", "data.text_columns=['messages']", "data.max_length=24",
    "eval.max_new_tokens=8", "data.chat_template=tests/data/chat.jinja",
)  # fmt: skip
_FILE = "{tmp}/train.jsonl"
DATA = {
    "a data file that is not there": Wrong(
        setting("data.train=no.jsonl"), "data.train", "'no.jsonl'", "Name a local file"
    ),
    "a data file of an unknown kind": Wrong(
        _train_on("train.docx", "x"), "data.train", "'.docx'", "Use one of .jsonl, .json, .csv"
    ),
    "a conversation that is a text": Wrong(
        _rows({"messages": "hello"}, settings=_CHAT), "line 1, column 'messages'", "'hello'", "a list of messages"
    ),
    "a conversation without an answer": Wrong(
        _rows({"messages": [{"role": "user", "content": "the film"}]}, settings=_CHAT),
        "line 1, column 'messages'",
        "role 'assistant'",
        "only those are trained on",
    ),
    "a chat template that is not there": Wrong(
        _rows({"messages": []}, settings=(*_CHAT, "data.chat_template=no.jinja")),
        "data.chat_template",
        "'no.jinja'",
        "Name a Jinja file",
    ),
    "a tokenizer without a chat template": Wrong(
        _rows({"messages": []}, settings=_CHAT[:-1]), "has no chat template", "task 'chat'", "data.chat_template"
    ),
    "no data file": Wrong(setting("data.train="), "data.train", "missing", "Name a local file"),
    "an empty JSONL file": Wrong(_train_on("train.jsonl", ""), "data.train", _FILE, "Add a row"),
    "an empty CSV file": Wrong(_train_on("train.csv", ""), "data.train", "{tmp}/train.csv", "Add a row"),
    "a CSV file of a header alone": Wrong(
        _train_on("train.csv", "text,label\n"), "{tmp}/train.csv", "no examples", "Add a row"
    ),
    "a line that is not JSON": Wrong(
        _train_on("train.jsonl", '{"text": "a", "label": "b"}\n{"text": "c", "label": "d"}\n{"text": "e", "label\n'),
        _FILE,
        "line 3 is not a JSON object (Unterminated string",
        "Repair it",
    ),
    "a line that is JSON and no object": Wrong(
        _train_on("train.jsonl", '{"text": "a", "label": "b"}\n["c", "d"]\n'),
        _FILE,
        "line 2 is not a JSON object",
        "Write one per line",
    ),
    "columns that change their type": Wrong(
        _rows({"text": "a", "label": "b"}, {"text": {"c": 1}, "label": "b"}),
        _FILE,
        "'text'",
        "not a plain text, number or label",
    ),
    "a CSV row with too many fields": Wrong(
        _train_on("train.csv", "text,label\na,b\nc,d,e\n"),
        "{tmp}/train.csv",
        "line 3 has 3 fields",
        "Put quotes around",
    ),
    "a TSV file with quotes around its texts": Wrong(
        _train_on("train.tsv", 'text\tlabel\n"a ""b"" c"\tx\nd\ty\n'), "{tmp}/train.tsv", "'text'", "as .csv or .jsonl"
    ),
    "text in another encoding": Wrong(
        _train_on("train.jsonl", '{"text": "café", "label": "a"}\n'.encode("latin-1")),
        _FILE,
        "line 1 is not UTF-8 text",
        "Save it in UTF-8",
    ),
    "a CSV file in another encoding": Wrong(
        _train_on("train.csv", "text,label\ncafé,a\n".encode("latin-1")), "{tmp}/train.csv", "0xe9", "Save it"
    ),
    "a text file in another encoding": Wrong(
        lambda shop: shop.causal(f"data.train={shop.file('train.txt', 'café '.encode('latin-1') * 99)}"),
        "{tmp}/train.txt",
        "0xe9",
        "Save it",
    ),
    "a Parquet file that is none": Wrong(
        _train_on("train.parquet", "text"), "data.train", "{tmp}/train.parquet", "name another file"
    ),
    "no label column": Wrong(
        setting("data.label_column=class"), "tests/data/train.jsonl has no column", "'class'", "Columns: text, label"
    ),
    "a CSV file without the text column": Wrong(
        _train_on("train.csv", "sentence,label\na,b\nc,d\n"), "{tmp}/train.csv", "no column 'text'", "data.text_columns"
    ),
    "a column of lists": Wrong(
        _rows({"text": ["a"], "label": "x"}, {"text": ["b"], "label": "y"}), _FILE, "column 'text'", "not a plain text"
    ),
    "a row without text": Wrong(_rows(*GOOD, {"text": None, "label": "good"}), _FILE, "line 41", "remove the row"),
    "a row without a label": Wrong(
        _rows(*GOOD, {"text": "film", "label": None}), _FILE, "'label'", "Give every example a label"
    ),
    "labels that are fractions": Wrong(
        _rows({"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}), _FILE, "'label'", 'task = "regression"'
    ),
    "one class": Wrong(
        _rows({"text": "a", "label": "x"}), _FILE, "1 class", "data.label_column, or add examples of another class"
    ),
    "as many labels as rows": Wrong(
        _rows(*({"text": f"film {i}", "label": f"essay number {i}"} for i in range(1200))),
        _FILE,
        "1200",
        "data.label_column",
    ),
    "a label that is no class": Wrong(
        lambda shop: shop.train(f"data.validation={shop.rows('val.jsonl', {'text': 'film', 'label': 'so-so'})}"),
        "{tmp}/val.jsonl",
        "label 'so-so' in line 1",
        "bad, good",
    ),
    "an order of other classes": Wrong(
        setting("data.label_names=['good', 'poor']"), "data.label_names", "['good', 'poor']", "Name exactly these"
    ),
    "a class twice": Wrong(
        setting("data.label_names=['good', 'good']"), "data.label_names", "['good', 'good']", "different names"
    ),
    "hidden labels": Wrong(
        lambda shop: shop.train(f"data.validation={shop.rows('val.jsonl', {'text': 'film', 'label': -1})}"),
        "{tmp}/val.jsonl",
        "label '-1' in line 1",
        "Name a split that has labels",
    ),
    "words where numbers are": Wrong(setting("task=regression"), "tests/data/train.jsonl", "'good'", "number"),
    "text for less than a sequence": Wrong(
        lambda shop: shop.causal(f"data.train={shop.rows('train.jsonl', {'text': 'the film'})}"),
        _FILE,
        "3 tokens in all",
        "or add text",
    ),
    "a test split that is not set": Wrong(
        lambda shop: ["eval", f"{shop.made}/run", "--set", "data.test="], "data.test", "not set", "Name a file"
    ),
    "a test file that is not there": Wrong(
        lambda shop: ["eval", f"{shop.made}/run", "--set", "data.test=no.csv"],
        "data.test",
        "'no.csv'",
        "Name a local file",
    ),
    "a dataset that is not on the hub": Wrong(
        setting("data.dataset=nobody/nothing", "data.train=train"), "data.dataset", "'nobody/nothing'", "split 'train'"
    ),
    "two columns for a language model": Wrong(
        causal_setting("data.text_columns=['text', 'label']"), "data.text_columns", "['text', 'label']", "one column"
    ),
}
