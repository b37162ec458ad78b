"""The benchmark of learned ranks runs."""

import json
import sys

from tools.bench.planted_ranks import main


def test_it_runs_and_prints_json(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["planted_ranks", "--json", "--seeds", "1", "--steps", "20"])
    main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["precision"] == report["recall"]  # 6 components are kept, as many as are planted
    assert report["runs"][0]["loss"] > 0.0
