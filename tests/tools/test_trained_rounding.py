"""The comparison of rounding in training with rounding afterwards: what it runs, its means, and going on."""

from __future__ import annotations

import json

import pytest

from tools.quality import trained_rounding


def _seed(plain, rounded, trained):
    return {
        kind: {"accuracy": value} for kind, value in zip(trained_rounding.KINDS, (plain, rounded, trained), strict=True)
    }


def test_a_gain_is_of_pairs_of_one_seed():
    found = trained_rounding.gain([_seed(0.8, 0.7, 0.75), _seed(0.6, 0.5, 0.57)], "accuracy")
    assert found == pytest.approx({"plain": 0.7, "rounded": 0.6, "trained": 0.66, "gain": 0.06, "standard_error": 0.01})
    assert trained_rounding.gain([_seed(0.8, 0.7, 0.75)], "accuracy")["standard_error"] is None


def test_runs_are_made_once(tmp_path, monkeypatch, capsys):
    calls = []

    def verb(name, *words):
        calls.append((name, words))
        return {"metrics": {"accuracy": 0.5}, "rounding": {"metrics_before": {"accuracy": 0.75}}}

    monkeypatch.setattr(trained_rounding, "verb", verb)
    words = ["x", "run.toml", "--out", str(tmp_path), "--sparsities", "0.5", "--seeds", "3", "--set", "a.b=1", "--json"]
    for expected in (6, 0):
        calls.clear()
        monkeypatch.setattr("sys.argv", words)
        trained_rounding.main()
        assert len(calls) == expected
        (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
        assert (row["plain"], row["rounded"], row["trained"], row["gain"]) == (0.75, 0.5, 0.5, 0.0)
    made = json.loads((tmp_path / "0.5-3" / "outcome.json").read_text())
    assert made["seed"] == "3"


def test_only_one_of_them_is_rounded_in_training(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trained_rounding, "verb", lambda *words: calls.append(words) or {"metrics": {}})
    grid = ['quantization.values="int4"', "quantization.group=64"]
    trained_rounding.exported("run.toml", tmp_path / "a", grid, [])
    trained_rounding.exported("run.toml", tmp_path / "b", [], ["--values", "int4"])
    trains, exports = ([words for words in calls if words[0] == verb] for verb in ("train", "export"))
    assert [grid[0] in words for words in trains] == [True, False]
    assert ["--values" in words for words in exports] == [False, True]
    assert all("--resume" in words for words in trains)
