"""``pst-ds export --format onnx`` of a run, and what verify and inspect make of its folder."""

from __future__ import annotations

import json
import shutil

import pytest

from pst_ds.cli.main import main
from pst_ds.writing.manifest import file_sums, write_manifest
from tests.cli.conftest import ROOT
from tests.cli.test_export_quantized import said_by

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'pst-ds[onnx]'")
pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")


@pytest.mark.parametrize("options", [[], ["--values", "int8", "--embeddings", "int8"]], ids=["plain values", "int8"])
@pytest.mark.few(1)
def test_verify_holds_the_file_against_the_run(folders, tmp_path, capsys, options):
    out = tmp_path / "onnx"
    words = ["export", folders / "run", "--format", "onnx", "--out", out, "--checkpoint", "step-00000004", *options]
    said_by(capsys, *words)
    said, _ = said_by(capsys, "verify", out)
    assert said["outputs"] == ["logits"]
    against = ["verify", out, "--against", folders / "run", "--checkpoint"]
    said, printed = said_by(capsys, *against, "step-00000004")
    assert said["reloaded_equal"] is True
    assert 0 < said["max_logit_difference"] <= said["allowed_logit_difference"]
    assert said["differing_predictions"] == 0
    assert "against the masked model in fp32" in printed
    assert main([*map(str, against), "final"]) == 1
    assert "is not the model in" in capsys.readouterr().err


@pytest.mark.thorough
def test_inputs_of_8_bits_do_not_make_verify_lenient(folders, tmp_path, capsys):
    """The file is compared with inputs of 16 bits, and what 8 change is said beside."""
    out = tmp_path / "onnx"
    options = ["--values", "int8", "--activation-bits", "8", "--checkpoint", "step-00000004"]
    said_by(capsys, "export", folders / "run", "--format", "onnx", "--out", out, *options)
    against = ["verify", out, "--against", folders / "run", "--checkpoint"]
    said, printed = said_by(capsys, *against, "step-00000004")
    assert said["max_logit_difference"] <= said["allowed_logit_difference"]
    assert said["max_logit_difference_in_8_bits"] >= said["max_logit_difference"]
    assert "with int8 activations" in printed
    assert main([*map(str, against), "final"]) == 1
    assert "is not the model in" in capsys.readouterr().err


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.thorough
def test_codes_of_a_run_in_bf16_are_not_rounded_again(tmp_path, capsys, monkeypatch, values):
    """A code times its scale has more bits than bf16: the graph multiplies with all of them, and so does its model."""
    monkeypatch.chdir(ROOT)
    run, out = tmp_path / "run", tmp_path / "onnx"
    settings = {"output_dir": str(run), "deepspeed_config": "", "train.num_steps": 4, "train.precision": "bf16"}
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["train", "tests/data/causal_lm.toml", "--quiet", *overrides]) == 0
    options = ["--dtype", "bf16", "--values", values, "--group", "row", "--embeddings", values]
    said_by(capsys, "export", run, "--format", "onnx", "--out", out, *options)
    said, _ = said_by(capsys, "verify", out, "--against", run)
    assert said["max_logit_difference"] <= said["allowed_logit_difference"] / 3


def test_a_file_without_a_manifest_or_that_is_no_graph_is_refused_in_one_message(tmp_path, capsys):
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    assert main(["verify", str(tmp_path)]) == 2
    assert "is not an export: pst_manifest.json is missing" in capsys.readouterr().err
    write_manifest(tmp_path, [], {"kind": "dense", "sparsity_requested": None, **file_sums(tmp_path)})
    assert main(["verify", str(tmp_path)]) == 2
    assert "ONNX Runtime" in capsys.readouterr().err


@pytest.mark.thorough
def test_inspect_knows_the_folder(folders, tmp_path, capsys):
    out = tmp_path / "onnx"
    said_by(capsys, "export", folders / "run", "--format", "onnx", "--out", out)
    assert main(["inspect", str(out)]) == 2
    assert "pst-ds verify" in capsys.readouterr().err
