"""tools.bench.patterns: which graphs it makes, and its table. Nothing is pruned, exported or timed here."""

from __future__ import annotations

import tomllib

import pytest

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'pst-ds[onnx]'")

from tools.bench import patterns


@pytest.fixture
def asked(monkeypatch):
    """The verbs that were asked for, each of which leaves the file that is looked for."""
    found = []

    def verb(name, *words):
        found.append((name, *words))
        out = patterns.Path(words[-1])
        out.mkdir(parents=True)
        (out / ("config.json" if name == "prune" else "model.onnx")).write_text("{}")

    def write_int8(folder, out):
        found.append(("int8", str(folder)))
        out.mkdir(parents=True)
        (out / "model.onnx").write_text("")

    monkeypatch.setattr(patterns, "verb", verb)
    monkeypatch.setattr(patterns, "write_int8", write_int8)
    return found


def test_every_pattern_has_a_graph_at_every_share_and_n_of_m_at_its_own(tmp_path, asked):
    files = patterns.made_files(tmp_path, ["1x4", "2:16"], [0.8, 0.9])
    assert list(files) == [patterns.DENSE, "1x4, 80 %", "1x4, 90 %", "2:16, 87.5 %"]
    assert all(file.is_file() for file in files.values())
    pruned = [words for words in asked if words[0] == "prune"]
    assert [words[words.index("--pattern") + 1] for words in pruned] == ["1x4", "1x4", "2:16"]
    assert ["--sparsity" in words for words in pruned] == [True, True, False]
    run = tomllib.loads((tmp_path / "run.toml").read_text())
    assert (run["task"], run["train"]["num_steps"]) == ("classification", 1)


def test_what_is_there_is_not_made_again(tmp_path, asked):
    first = patterns.made_files(tmp_path, ["1x4"], [0.8])
    before = len(asked)
    assert patterns.made_files(tmp_path, ["1x4"], [0.8]) == first
    assert len(asked) == before


def test_the_table_has_a_row_for_each(capsys):
    rows = [{"contestant": "1x4, 90 %", "threads": 1, "file_bytes": 15_300_000, "ms": {"1x32": 1.5, "8x128": 31.25}}]
    patterns.print_table(rows)
    assert capsys.readouterr().out.splitlines()[-1] == "| 1x4, 90 % | 15.3 | 1.50 | 31.25 |"
