"""The benchmark of experts runs, and none of its passes has a tensor as large as the stack for a moment."""

import json
import sys

from tools.bench.experts import main


def test_it_runs_and_prints_json(monkeypatch, capsys):
    sizes = ["--experts", "16", "--outputs", "64", "--inputs", "256", "--tokens", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["experts", "--json", "--precision", "fp32", *sizes])
    main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["nanoseconds_a_weight"]["2"]
    assert {"forward", "backward", "dense forward", "dense backward"} < found.keys()
    assert 1.0 <= found["forward matrices"] < 3.0
    assert 1.0 < found["backward matrices"] < 8.0  # a tile is the whole of so small a matrix
