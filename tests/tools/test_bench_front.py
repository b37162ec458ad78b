"""The front of decoders: which files are made and measured, what is not measured again, and which are the best."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from pst_ds.errors import InputError
from tests.lazy_module import lazy_module
from tools.bench.front import decoders, figure, files
from tools.quality.cells import Lines

program = lazy_module("tools.bench.front.__main__")
TINY = "tests/data/tiny-llama"


def test_the_front_has_no_point_that_another_beats():
    rng = np.random.default_rng(0)
    points = [tuple(point) for point in rng.integers(0, 12, (60, 2)).tolist()]
    beaten = [p for p in points if any(o != p and o[0] <= p[0] and o[1] <= p[1] for o in points)]
    assert figure.front(points) == sorted({*points} - {*beaten})


def test_a_model_is_its_own_reference_unless_it_names_one():
    words = ["decoders", "--models", f"dense={TINY}", "half=runs/half@dense,other"]
    dense, half = program.make_parser().parse_args(words).models
    assert (dense.references, half.references) == (("dense",), ("dense", "other"))
    with pytest.raises(SystemExit):
        program.make_parser().parse_args(["decoders", "--models", TINY])


def test_a_finished_file_is_measured_unchanged(tmp_path):
    gguf = tmp_path / "any.gguf"
    writer = GGUFWriter(gguf, "llama")
    for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "token_embd.weight", "output.weight"):
        kind = GGMLQuantizationType.Q4_0 if name.startswith("blk") else GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(np.ones((32, 32), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (file,) = files.files_of(files.Model("trained", gguf, ("dense",)), tmp_path / "made", [])
    assert (file.engine, file.kind, file.path) == ("llama.cpp", "Q4_0", gguf)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").touch()
    run, dense = (files.Model("one", folder, ()) for folder in (tmp_path / "run", Path(TINY)))
    assert (run.engine_of_file, run.is_dense, dense.engine_of_file, dense.is_dense) == ("", False, "", True)


def test_importance_is_the_mean_square_of_a_layers_inputs(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("the film is a sharp and moving story\n" * 20)
    monkeypatch.setattr(files, "CALIBRATION", text)
    monkeypatch.setattr(files, "CALIBRATION_CHUNKS", 1)
    monkeypatch.setattr(files, "CHUNK_TOKENS", 8)
    found = files.importance_of(TINY, tmp_path / "kept.npz")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY)
    ids = AutoTokenizer.from_pretrained(TINY)(text.read_text())["input_ids"][:8]
    with torch.no_grad():
        block = model.model.layers[0]
        inputs = block.input_layernorm(model.model.embed_tokens(torch.tensor([ids])))
    wanted = inputs[0].square().mean(0).numpy()
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(found[f"blk.0.{name}.weight"], wanted, rtol=1e-5)
    assert all(name.startswith("blk.") for name in found)
    monkeypatch.setattr(files, "CALIBRATION", tmp_path / "none")
    assert files.importance_of(TINY, tmp_path / "kept.npz").keys() == found.keys()


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """``measured()`` measures two of our files of a tiny model; returns its rows by kind and the opened files."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "a sharp and moving film " * 30}) + "\n" for _ in range(8)))
    monkeypatch.setitem(files.OURS, "int4, 32", ("--values", "int4", "--group", "row"))
    monkeypatch.setattr(decoders, "CORPORA", {"Brown": text})
    monkeypatch.setattr(decoders, "CHUNK_TOKENS", 24)
    monkeypatch.setattr(decoders, "PROMPT", 12)
    monkeypatch.setattr(decoders, "FOLLOWING", 4)
    monkeypatch.setattr(decoders, "CONTEXT", 64)
    opened = []

    @contextmanager
    def working(openers, threads, preload=()):
        opened.extend(openers)
        workers = {name: SimpleNamespace(engine=opener()) for name, opener in openers.items()}
        for worker in workers.values():
            worker.ask = lambda work, *arguments, engine=worker.engine: work(engine, *arguments)
        yield workers

    monkeypatch.setattr(decoders, "working", working)

    def measure(*more):
        words = ["decoders", "--models", f"dense={TINY}", "--folder", str(tmp_path / "files"), "--corpora", "Brown"]
        args = program.make_parser().parse_args(
            [*words, "--chunks", "2", "--repeats", "1", "--only", "int8", "int4, 32", *more]
        )
        opened.clear()
        lines = Lines(tmp_path / "front.jsonl")
        decoders.measure(args, lines)
        return lines, list(opened)

    return measure


def test_rows_of_our_files_are_measured_once(measured, tmp_path):
    lines, opened = measured()
    assert opened[0] == "reference"
    kinds = [line["kind"] for line in lines.by_id.values()]
    assert sorted(kinds) == [decoders.QUALITY] * 2 + [decoders.SPEED] * 2
    by_file = {line["file"]: line for line in lines.by_id.values() if line["kind"] == decoders.QUALITY}
    assert 0.0 < by_file["int8"]["kl_mean"] < by_file["int4, 32"]["kl_mean"]
    assert by_file["int8"]["tokens"] == 2 * 23
    level = next(line["instructions"] for line in lines.by_id.values() if line["kind"] == decoders.SPEED)
    rows = list(decoders.table_rows(lines, level))
    assert {row["file"] for row in rows} == {"int8", "int4, 32"}
    assert "| dense | pst-ds int8 |" in decoders.table(lines, level)
    figure.draw_decoders(rows, "Brown", tmp_path / "front.svg")
    said = {node.text for node in ElementTree.parse(tmp_path / "front.svg").iter() if node.text}
    assert {"int8", "int4, 32"} <= said
    again, opened = measured()
    assert opened == []
    assert again.by_id == lines.by_id
    for kind in ("int8", "int4, 32"):
        folder = tmp_path / "files" / "dense" / kind.replace(", ", "-")
        (file,) = files.files_of(files.Model("finished", folder, ()), tmp_path, [])
        assert (file.engine, file.kind, file.path) == ("pst-ds", kind.removesuffix(", 32"), folder)


def test_a_reference_is_a_dense_model_of_the_list(measured):
    with pytest.raises(InputError, match="reference 'other' is not a dense one of them"):
        measured("--models", f"half={TINY}@other")
