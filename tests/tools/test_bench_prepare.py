"""The benchmark of prepare compares what it says, and prints its keys."""

import json
import sys

import pytest

from tools.bench.prepare import main, ratios, write_texts


def test_ratios_are_of_cpu_time_against_map_and_of_the_clock_between_processes():
    rows = [
        {"contestant": "map", "mb_per_cpu_second": 2.0, "mb_per_second": 9.0},
        {"contestant": "one", "mb_per_cpu_second": 3.0, "mb_per_second": 2.5},
        {"contestant": "two", "mb_per_cpu_second": 9.0, "mb_per_second": 5.0},
    ]
    assert ratios(rows) == {"cpu_against_map": 1.5, "two_against_one": 2.0}


def test_texts_have_the_size_asked_for(tmp_path):
    size = write_texts(tmp_path / "a.jsonl", 300_000)
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert size == sum(len(text.encode()) for text in texts) >= 300_000


def test_it_runs_and_prints_json(monkeypatch, capsys, alone):
    monkeypatch.setattr(sys, "argv", ["prepare", "--megabytes", "0.4", "--repeats", "1", "--json"])
    main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["contestant"] for row in report["rows"]} == {"map", "one", "two"}
    assert report["ratios"].keys() == {"cpu_against_map", "two_against_one"}
    assert report["conditions"]["megabytes"] == pytest.approx(0.4, abs=0.3)
