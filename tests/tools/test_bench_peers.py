"""Encoders compared with other runtimes: ratios, and the printed object."""

from __future__ import annotations

import json
import os
import sys
from functools import partial

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'pst-ds[onnx]'")

from tools.bench.peers import __main__ as peers
from tools.bench.peers import encoders

NAMES = ("dense, OpenVINO int8", "dense, ONNX Runtime int8", "pst-90 int8, pst-ds")
IN_RATIOS = ("", "", "pst-90")


def rows_of(milliseconds, threads=1, batch=1, tokens=32):
    size = {"task": "encode", "threads": threads, "batch": batch, "tokens": tokens}
    named = zip(NAMES, IN_RATIOS, milliseconds, strict=True)
    return [{**size, "contestant": name, "in_ratios": short, "ms": ms} for name, short, ms in named]


def test_a_ratio_is_how_many_times_as_fast_ours_is():
    found = encoders.ratios([*rows_of((8.0, 6.0, 2.0)), *rows_of((5.0, 4.0, 2.0), threads=2, batch=8, tokens=128)])
    assert found == {
        "pst-90_over_openvino_int8": {"1x32/1": 4.0, "8x128/2": 2.5},
        "pst-90_over_onnx_runtime_int8": {"1x32/1": 3.0, "8x128/2": 2.0},
        "encoder_over_openvino_int8": {"1x32": 4.0},
    }


def test_bits_of_inputs_are_part_of_both_names(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"graph")
    rounded, exact = (encoders.ours("pst-50", bits, file) for bits in ("8", ""))
    assert rounded.name == "pst-50 int8, inputs of 8 bits, pst-ds"
    assert (exact.name, exact.in_ratios, exact.file_bytes) == ("pst-50 int8, pst-ds", "pst-50", 5)
    rows = rows_of((8.0, 6.0, 2.0))
    rows[-1] |= {"contestant": rounded.name, "in_ratios": rounded.in_ratios}
    assert encoders.ratios(rows)["pst-50_in_8_bits_over_openvino_int8"] == {"1x32/1": 4.0}


def open_fake(folder, name, threads):
    """In a process of its own, as its file says."""
    (folder / f"opened-{os.getpid()}").write_text(f"{NAMES.index(name)} {threads}")
    return lambda feed: np.array([[0.0, float(feed["input_ids"].shape[1] > 3)]])


def test_it_prints_its_object(tmp_path, monkeypatch, capsys):
    config = tmp_path / "dense" / "export" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"vocab_size": 50}))
    fakes = [
        encoders.Contestant(name, 1000, partial(open_fake, tmp_path, name), short)
        for name, short in zip(NAMES, IN_RATIOS, strict=True)
    ]
    monkeypatch.setattr(encoders, "contestants", lambda folder, sparse: iter(fakes))
    options = [
        "--no-decoders",
        "--folder",
        str(tmp_path),
        "--threads",
        "1",
        "2",
        "--repeats=2",
        "--no-quality",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", ["peers", *options])
    peers.main()
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    assert len(found["rows"]) == len(NAMES) * 2 * len(encoders.SHAPES)
    assert set(found["ratios"]["encoder_over_openvino_int8"]) == set(encoders.SHAPES)
    assert all(row["quality"] == {"accuracy": None} for row in found["rows"])
    opened = [file.read_text().split() for file in tmp_path.glob("opened-*")]
    assert sorted(map(tuple, opened)) == sorted((str(at), str(threads)) for at in range(3) for threads in (1, 2))
    assert printed[0].startswith("| ms | MB | accuracy | 1 x 32, 1 thr.")
