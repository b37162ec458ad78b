"""The benchmark of the loss runs, and chunks take less memory in it."""

import json
import sys

import pytest

from tools.bench.loss import main


@pytest.mark.parametrize("more", [[], ["--trained"]])
def test_it_runs_and_prints_json(monkeypatch, capsys, more):
    sizes = ["--classes", "20000", "--width", "8", "--tokens", "512", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["loss", "--json", *sizes, *more])
    main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(report["seconds"]) == {"chunks", "whole"}
    assert report["bytes_an_entry"]["whole"] > 11
    assert report["bytes_an_entry"]["chunks"] < 4
