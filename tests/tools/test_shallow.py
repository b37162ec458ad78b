"""Baselines without a transformer: what they read, what they can tell apart and what they cannot."""

from __future__ import annotations

import json
import re
from itertools import permutations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.lazy_module import lazy_module

shallow = lazy_module("tools.quality.shallow")

ENCODER = "tests/data/tiny-bert"
NAMES = ("cold", "dull", "fine", "plot", "scene", "story")
"""Words that are tokens of the encoder."""
KINDS = ("bag of words", "static embeddings")


def written(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def measured(kind, folder, train, test, columns=("text",)):
    files = {split: written(folder, f"{split}.jsonl", rows) for split, rows in (("train", train), ("test", test))}
    data = {"train": files["train"], "validation": files["test"], "text_columns": columns, "max_length": 24}
    settings = {"model": {"path": ENCODER}, "data": data, "seed": 0}
    return shallow.measure(kind, settings, {"test": files["test"]}, folder / "files", folder / "shared")


def test_every_kind_is_tested():
    assert tuple(shallow.KINDS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_learned_and_roles_in_a_pair_are_not(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.quality.shallow.RATE", 0.03)  # a few steps suffice
    said = [{"text": f"a {name} film", "label": "good" if name < "o" else "bad"} for name in NAMES] * 20
    found = measured(kind, tmp_path, said, said[:6])
    assert found["tests"]["test"]["accuracy"] == found["validation"]["accuracy"] == 1.0
    (facts,) = found["files"].values()
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "files").iterdir())
    pairs = [
        {"text": f"{a} met {b}", "other": f"{x} was met by {y}", "label": "true" if y == a else "false"}
        for a, b in permutations(NAMES, 2)
        for x, y in ((a, b), (b, a))
    ]
    found = measured(kind, tmp_path, pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :], ("text", "other"))
    assert found["tests"]["test"]["accuracy"] < 0.75


def test_products_of_words_tell_whether_two_texts_share_one(tmp_path):
    pairs = [{"text": f"of {a}", "other": f"on {b}", "label": str(a == b)} for a in NAMES for b in (a, *NAMES)]
    found = measured("bag of words", tmp_path, pairs * 3, pairs, ("text", "other"))
    assert found["tests"]["test"]["accuracy"] == 1.0


def test_texts_are_cut_where_the_encoder_cuts_them(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)
    rows = [{"text": "one good film. " * 9, "other": "bad", "label": "x"}, {"text": "a", "other": "b c", "label": "y"}]
    path = written(tmp_path, "rows.jsonl", rows)
    found = shallow.read(path, ENCODER, ("text", "other"), 12)
    for row, texts in zip(rows, found.texts, strict=True):
        kept = tokenizer(row["text"], row["other"], truncation=True, max_length=12)["input_ids"]
        assert tokenizer(*texts)["input_ids"] == kept
    assert found.texts[1] == ("a", "b c")
    assert found.labels == ["x", "y"]


def test_static_embeddings_are_the_encoders_outputs_for_single_tokens():
    """Distances are those of weighted outputs, as long as all principal components are kept."""
    tokenizer, model = AutoTokenizer.from_pretrained(ENCODER), AutoModel.from_pretrained(ENCODER).eval()
    table = shallow.distilled(ENCODER)
    assert table.shape == (len(tokenizer), min(shallow.DIMENSIONS, model.config.hidden_size))
    kept = [i for i in range(len(tokenizer)) if not re.match(r"\[[A-Z]", tokenizer.convert_ids_to_tokens(i))]
    assert not table[[i for i in range(len(tokenizer)) if i not in kept]].any()
    share = torch.tensor([1 / (rank + 2) for rank in range(len(kept))])
    weights = shallow.SIF / (shallow.SIF + share / share.sum())
    places = [0, 7, len(kept) - 1]
    with torch.no_grad():
        one, two, three = (
            model(torch.tensor([[tokenizer.cls_token_id, kept[p], tokenizer.sep_token_id]]))[0][0].mean(0)
            for p in places
        )
    found = table[[kept[p] for p in places]] / weights[places][:, None]
    torch.testing.assert_close((found[0] - found[1]).norm(), (one - two).norm(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((found[0] - found[2]).norm(), (one - three).norm(), rtol=1e-3, atol=1e-4)
