"""Text that a model writes itself: the right number of draws, from its own distribution, parted into documents."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pst_ds.errors import InputError
from tools.quality import own_text

TINY = "tests/data/tiny-llama"


def test_what_is_drawn_has_the_models_own_distribution():
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    model.lm_head.weight.data *= 20  # some tokens are far likelier than others
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1]])).logits[0, -1].softmax(-1)
    assert expected.max() > 3 * expected.mean()
    torch.manual_seed(0)
    drawn = own_text.draw(model, 1, 4000, 1)
    assert drawn.shape == (4000, 1)
    shares = drawn.flatten().bincount(minlength=len(expected)) / len(drawn)
    assert (shares - expected).abs().max() < 5 * (expected.max() / len(drawn)).sqrt()


def test_a_row_is_parted_at_special_tokens():
    assert own_text.parted([5, 6, 2, 2, 7, 1], {1, 2}) == [[5, 6], [7]]
    assert own_text.parted([1], {1}) == []


def test_documents_are_written_as_rows_the_same_for_a_seed(tmp_path, monkeypatch, capsys):
    tokenizer, found = AutoTokenizer.from_pretrained(TINY), []
    monkeypatch.setattr(own_text, "BATCH", 2)
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        out = tmp_path / "texts" / f"{name}.jsonl"
        words = [TINY, "--out", str(out), "--samples", "3", "--tokens", "12", "--first", tokenizer.bos_token]
        monkeypatch.setattr(sys, "argv", ["own_text", *words, "--seed", seed])
        own_text.main()
        found.append([json.loads(line)["text"] for line in out.read_text().splitlines()])
        assert f"{len(found[-1])} documents" in capsys.readouterr().out
    assert found[0] == found[1] != found[2]
    assert len(found[0]) >= 3
    assert all(found[0])


def test_a_first_token_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"'<none>'.*has no such token. Choose one of its special tokens: .*<s>"):
        own_text.write(TINY, tmp_path / "out.jsonl", 1, 1, "<none>", 0)
