"""The benchmark of mapped tokens opens what it makes, and prints its keys."""

import json

from tools.bench import mapped
from tools.bench.mapped import main, make_store, opening


def test_stores_of_either_kind_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "_LENGTH", 64)
    small = opening(str(make_store(tmp_path / "small", 500_000, mapped.TOKENIZER)), mapped.TOKENIZER)
    monkeypatch.setattr(mapped, "_WRITTEN", 0)
    sparse = opening(str(make_store(tmp_path / "sparse", 500_000, mapped.TOKENIZER)), mapped.TOKENIZER)
    assert small["sequences"] == sparse["sequences"] == 500_000 // 64
    assert small["digest"] != sparse["digest"]
    assert (tmp_path / "sparse" / "tokens-00000.bin").stat().st_blocks == 0


def test_it_prints_json(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["mapped", "--json"])
    monkeypatch.setattr(mapped, "STORES", {"few": 500_000})
    monkeypatch.setattr(mapped, "_measured", lambda store, tokenizer: {"seconds": 0.1, "resident_bytes": 1})
    main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["bars"].keys() <= report["rows"][0].keys()
    assert report["rows"][0]["store"] == "few"
