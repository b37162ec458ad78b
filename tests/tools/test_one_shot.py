"""The comparison of one-shot methods: its shares, and what it finds of a tiny model, once."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pst_ds.config.toml import load_run
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


def test_what_training_wins_back_is_a_share_of_what_the_reference_adds_before_it():
    rows = [
        {"zeros": "0.5", "method": "sparsegpt", "added": {"test": 0.4, "other": 0.5}},
        {"zeros": "0.5", "method": "alps", "added": {"test": 0.2, "other": 0.3}},
    ]
    dense, trained = {"test": 3.0, "other": 2.0}, {"test": 3.1, "other": 2.2}
    assert one_shot.shares_won_back(rows, trained, dense) == pytest.approx({"test": 0.75, "other": 0.6})
    assert one_shot.shares_won_back(rows[1:], trained, dense) == {}


@pytest.mark.parametrize(("method", "is_fixed"), [("masked-lora", True), ("pst", False)])
def test_a_run_is_trained_from_every_folder_once(method, is_fixed, tmp_path, monkeypatch, capsys):
    train = tmp_path / "train.toml"
    train.write_text(f'method = "{method}"\n' + Path(RUN).read_text())
    words = [RUN, "--out", str(tmp_path), "--zeros", "0.5", "2:4", "--methods", "sparsegpt", "alps --swaps 2", "--json"]
    monkeypatch.setattr(sys, "argv", ["one_shot", *words, "--train", str(train)])
    calls = []
    monkeypatch.setattr(one_shot, "verb", lambda *words: calls.append(words))

    def losses_of(run_file, model, *_):
        return {"test": 2.0 if not model else 2.5 if "trained-train" in model else 3.0}

    monkeypatch.setattr(one_shot, "losses_of", losses_of)
    for made in (4, 0):
        calls.clear()
        one_shot.main()
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        assert [row["won_back"] for row in rows] == [{"test": 0.5}] * 4
        assert [sum(words[0] == verb for words in calls) for verb in ("prune", "train", "export")] == [made] * 3
    folders = [tmp_path / f"{name}-{zeros}" for zeros in ("0.5", "2of4") for name in ("sparsegpt", "alps-swaps-2")]
    assert all((folder / "trained-train" / one_shot.OUTCOME).is_file() for folder in folders)

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--train-from", "alps --swaps 2"])
    one_shot.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row.get("won_back") for row in rows] == [None, {"test": 0.5}] * 2

    run = load_run(str(train), one_shot.training_settings(train, folders[3], "2:4"))
    assert (run.model.path, run.pst.pattern, run.schedule.final_sparsity) == (str(folders[3] / "model"), "2:4", 0.5)
    assert (run.pst.initial_mask == "zeros") == is_fixed


def test_models_are_pruned_and_tested_once(tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.txt"
    other.write_text("a film that nobody saw, and a song that nobody heard. " * 40)
    words = [RUN, "--out", str(tmp_path), "--zeros", "2:4", "--samples", "4", "--tested", "3", "--json"]
    methods = [
        "sparsegpt",
        "alps",
        "wanda --swaps 2",
        "alps --values int4 --group row",
        "sparsegpt --bits 4 --group row",
    ]
    words += ["--texts", str(other), "--methods", *methods]
    monkeypatch.setattr(sys, "argv", ["one_shot", *words])
    one_shot.main()
    said = capsys.readouterr().out
    rows = json.loads(said.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == methods
    assert rows[0]["of_reference"] == {"test": 1.0, "other": 1.0}
    for text in ("test", "other"):
        assert rows[1]["added"][text] == pytest.approx(rows[1]["of_reference"][text] * rows[0]["added"][text])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "alps-2of4" / "model")
    assert (model.model.layers[0].mlp.up_proj.weight.view(-1, 4).count_nonzero(1) == 2).all()
    assert json.loads((tmp_path / "wanda-swaps-2-2of4" / "model" / "pruning.json").read_text())["swaps"] == 2

    coded = load_file(tmp_path / "alps-values-int4-group-row-2of4" / "model" / "pst_dense.safetensors")
    assert "model.layers.0.mlp.up_proj.codes" in coded
    assert len({row["losses"]["test"] for row in rows}) == len(methods)
    told = json.loads((tmp_path / "sparsegpt-bits-4-group-row-2of4" / "model" / "pruning.json").read_text())
    assert told["values"] == "int4"

    monkeypatch.setattr(one_shot, "verb", lambda *_: pytest.fail("pruned again"))
    monkeypatch.setattr(one_shot, "losses_of", lambda *_: pytest.fail("tested again"))
    one_shot.main()
    assert capsys.readouterr().out.splitlines()[-1] == said.splitlines()[-1]


def test_the_loss_is_that_of_the_first_sequences():
    one, three = (one_shot.losses_of(RUN, "", [], [], limit)["test"] for limit in (1, 3))
    assert math.isfinite(one)
    assert one != three
