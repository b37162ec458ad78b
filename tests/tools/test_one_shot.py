"""The comparison of one-shot methods: its shares, and what it finds of a tiny model, once."""

from __future__ import annotations

import json
import math
import sys

import pytest
from transformers import AutoModelForCausalLM

from tools.quality import one_shot

RUN = "tests/data/causal_lm.toml"


def test_a_share_is_of_what_the_reference_adds_with_as_many_zeros():
    rows = [
        {"zeros": "0.5", "method": "alps", "added": {"test": 0.2}},
        {"zeros": "2:4", "method": "sparsegpt", "added": {"test": 0.8}},
        {"zeros": "0.5", "method": "sparsegpt", "added": {"test": 0.4, "other": 0.5}},
        {"zeros": "0.5", "method": "alps --swaps 2", "added": {"test": 0.3, "other": 0.1}},
    ]
    assert one_shot.shares_of_reference(rows) == pytest.approx({"test": 0.75, "other": 0.2})
    assert one_shot.shares_of_reference(rows[:1]) == {}


def test_models_are_pruned_and_tested_once(tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.txt"
    other.write_text("a film that nobody saw, and a song that nobody heard. " * 40)
    words = [RUN, "--out", str(tmp_path), "--zeros", "2:4", "--samples", "4", "--tested", "3", "--json"]
    words += ["--texts", str(other), "--methods", "sparsegpt", "alps", "wanda --swaps 2"]
    monkeypatch.setattr(sys, "argv", ["one_shot", *words])
    one_shot.main()
    said = capsys.readouterr().out
    rows = json.loads(said.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["sparsegpt", "alps", "wanda --swaps 2"]
    assert rows[0]["of_reference"] == {"test": 1.0, "other": 1.0}
    for text in ("test", "other"):
        assert rows[1]["added"][text] == pytest.approx(rows[1]["of_reference"][text] * rows[0]["added"][text])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alps-2of4" / "model")
    assert (model.model.layers[0].mlp.up_proj.weight.view(-1, 4).count_nonzero(1) == 2).all()
    assert json.loads((tmp_path / "wanda-swaps-2-2of4" / "model" / "pruning.json").read_text())["swaps"] == 2

    monkeypatch.setattr(one_shot, "verb", lambda *_: pytest.fail("pruned again"))
    monkeypatch.setattr(one_shot, "losses_of", lambda *_: pytest.fail("tested again"))
    one_shot.main()
    assert capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1]


def test_the_loss_is_that_of_the_first_sequences():
    one, three = (one_shot.losses_of(RUN, "", [], [], limit)["test"] for limit in (1, 3))
    assert math.isfinite(one)
    assert one != three
