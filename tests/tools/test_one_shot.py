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
        {"zeros": "0.5", "method": "alps", "added": 0.2},
        {"zeros": "2:4", "method": "sparsegpt", "added": 0.8},
        {"zeros": "0.5", "method": "sparsegpt", "added": 0.4},
        {"zeros": "0.5", "method": "alps", "added": 0.3},
    ]
    assert one_shot.share_of_reference(rows) == pytest.approx(0.75)
    assert one_shot.share_of_reference(rows[:1]) is None


def test_models_are_pruned_and_tested_once(tmp_path, monkeypatch, capsys):
    words = [RUN, "--out", str(tmp_path), "--zeros", "2:4", "--samples", "4", "--tested", "3", "--json"]
    monkeypatch.setattr(sys, "argv", ["one_shot", *words])
    one_shot.main()
    said = capsys.readouterr().out
    (reference, alps) = json.loads(said.splitlines()[-1])["rows"]
    assert (reference["method"], alps["method"], reference["of_reference"]) == ("sparsegpt", "alps", 1.0)
    assert alps["added"] == pytest.approx(alps["of_reference"] * reference["added"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alps-2of4" / "model")
    assert (model.model.layers[0].mlp.up_proj.weight.view(-1, 4).count_nonzero(1) == 2).all()

    monkeypatch.setattr(one_shot, "verb", lambda *_: pytest.fail("pruned again"))
    monkeypatch.setattr(one_shot, "loss_of", lambda *_: pytest.fail("tested again"))
    one_shot.main()
    assert capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1]


def test_the_loss_is_that_of_the_first_sequences():
    one, three = (one_shot.loss_of(RUN, "", [], limit) for limit in (1, 3))
    assert math.isfinite(one)
    assert one != three
