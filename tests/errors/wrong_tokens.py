"""Stores of tokens and mixtures that a run cannot train on, and texts that cannot be prepared."""

from __future__ import annotations

from .workshop import LLAMA, Workshop, Wrong, causal_setting, setting, words


def _prepare(*arguments: str):
    return words("prepare", *arguments, "--out", "{tmp}/store", "--tokenizer", LLAMA)


def _half_a_store(shop: Workshop) -> list[str]:
    shop.file("store/manifest.json", "{}")
    return shop.causal(f"data.train={shop.tmp}/store")


def _sources(*sources: str):
    return causal_setting("data.train=", f"data.sources=[{', '.join('{' + of + '}' for of in sources)}]")


_TRAIN = 'path = "tests/data/train.jsonl"'
TOKENS = {
    "a store with a foreign manifest": Wrong(_half_a_store, "{tmp}/store/manifest.json", "not the manifest", "Name a"),
    "weights that do not add up": Wrong(
        _sources(f"{_TRAIN}, weight = 0.5", f"{_TRAIN}, weight = 0.6"), "data.sources", "[0.5, 0.6]", "add up to 1"
    ),
    "a source that is not there": Wrong(
        _sources(f"{_TRAIN}, weight = 0.5", 'path = "no/such/store", weight = 0.5'),
        "'no/such/store'", "does not exist", "Name a file",
    ),
    "sources for a classifier": Wrong(
        setting("data.train=", f"data.sources=[{{{_TRAIN}}}]"), "data.sources", "'classification'", "data.train"
    ),
    "sources besides data.train": Wrong(
        causal_setting(f"data.sources=[{{{_TRAIN}}}]"), "data.train", "data.sources", "Remove the other"
    ),
    "prepare of nothing": Wrong(_prepare("{tmp}/no.jsonl"), "{tmp}/no.jsonl", "does not exist", "Name a file"),
    "prepare of an unknown kind": Wrong(
        lambda shop: [
            "prepare", shop.file("a.docx", "x"), "--out", f"{shop.tmp}/store", "--tokenizer", LLAMA,
        ],
        "{tmp}/a.docx", "unknown kind", "Use one of .jsonl",
    ),
    "prepare without the column": Wrong(
        _prepare("tests/data/train.jsonl", "--text-column", "body"), "tests/data/train.jsonl", "'body'", "Columns: text"
    ),
    "prepare with a tokenizer that is none": Wrong(
        words("prepare", "tests/data/train.jsonl", "--out", "{tmp}/store", "--tokenizer", "tests/data"),
        "--tokenizer tests/data", "has no tokenizer", "Name the language model's folder",
    ),
}  # fmt: skip
