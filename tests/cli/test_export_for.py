"""``pst-ds export --for TARGET``: the options that it chooses give files that the target reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pst_ds.cli.export import TARGETS, chosen_options
from pst_ds.cli.main import main
from pst_ds.export.export_run import ExportSettings
from pst_ds.inference.decoder import Decoder
from tests.cli.conftest import ROOT
from tests.cli.test_export_quantized import said_by
from tests.pairs import every_pair

_LOADS = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "pst_ds" not in sys.modules
assert any((p == 0).float().mean() > 0.5 for p in model.parameters())
"""
CHOSEN = {
    "cpu": ["--format bitmask", "--values int8", "--embeddings int8"],
    "vllm": ["--format compressed-tensors", "--values int8", "--activation-bits 8"],
    "transformers": ["--format dense"],
}


@every_pair
@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_chosen_does_not_conflict(target, is_causal, is_sparse):
    options = chosen_options(target, is_causal=is_causal, is_sparse=is_sparse)
    assert ExportSettings(**{name: value for name, (value, _) in options.items()}).options() is not None
    assert all(reason for _, reason in options.values())


@pytest.mark.few(2)
@pytest.mark.parametrize("source", ["run", "dense"])
@pytest.mark.parametrize("target", CHOSEN)
def test_a_sparse_decoder_gets_what_its_target_reads(folders, tmp_path, capsys, source, target):
    out = tmp_path / "out"
    assert main(["export", str(folders / source), "--for", target, "--out", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in said if line.startswith("--")] == CHOSEN[target]
    if target == "cpu":
        assert Decoder.from_pretrained(out, 16, threads=1).forward([3, 4]).isfinite().all()
    if target == "transformers":
        subprocess.run([sys.executable, "-c", _LOADS, str(out)], check=True)


def test_a_dense_decoder_is_not_packed_and_given_options_stay(tmp_path, capsys):
    words = ["export", "tests/data/tiny-llama", "--for", "cpu", "--values", "int4", "--group", "row"]
    assert main([*words, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "--format dense: " in said
    assert "--values" not in said
    assert Decoder.from_pretrained(tmp_path / "out", 16, threads=1).forward([3]).isfinite().all()
    assert main([*words, "--format", "csr", "--out", str(tmp_path / "other")]) == 2
    assert "--for cpu chooses the format. Remove --format csr" in capsys.readouterr().err
    assert not Path(tmp_path / "other").exists()


def test_the_accuracy_lost_is_the_difference_of_eval_and_verify(folders, tmp_path, capsys):
    out, run = tmp_path / "out", folders / "run"
    said, printed = said_by(capsys, "export", run, "--for", "cpu", "--values", "int4", "--group", "row", "--out", out)
    lost = said["quantisation_loss"]
    evaluated, _ = said_by(capsys, "eval", run, "--split", "validation")
    verified, _ = said_by(capsys, "verify", out, "--against", run, "--split", "validation")
    assert lost["examples"] == evaluated["examples"] == verified["examples"]
    assert lost["trained"] == pytest.approx({name: evaluated[name] for name in lost["trained"]}, rel=1e-5)
    assert lost["exported"] == pytest.approx(verified["metrics"], rel=1e-5)
    change = lost["exported"]["loss"] - lost["trained"]["loss"]
    assert abs(change) > 1e-4
    assert f"({change:+.4f})" in printed


def test_weights_for_other_engines_are_quantised_as_in_a_file(folders, tmp_path, capsys):
    words = ["export", folders / "run", "--values", "int8", "--for"]
    in_file, simulated = (
        said_by(capsys, *words, name, "--out", tmp_path / name)[0]["quantisation_loss"]
        for name in ("transformers", "vllm")
    )
    assert in_file["by"] == "transformers" != simulated["by"]
    assert simulated["exported"] == pytest.approx(in_file["exported"], rel=1e-5)


def test_an_export_without_its_data_says_so(folders, tmp_path, capsys):
    words = ["export", folders / "run", "--for", "cpu", "--out", tmp_path / "out"]
    said, printed = said_by(capsys, *words, "--set", 'data.validation="moved.jsonl"')
    assert said["quantisation_loss"] is None
    assert "accuracy lost to quantisation is unknown: " in printed
    assert "moved.jsonl" in printed


def test_an_encoder_of_a_run_without_masks_becomes_a_plain_graph(tmp_path, capsys, monkeypatch):
    """A graph with sparse products needs pruned weights, and method "lora" prunes none."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="needs pip install 'pst-ds[onnx]'")
    monkeypatch.chdir(ROOT)
    run, out = tmp_path / "run", tmp_path / "onnx"
    settings = {"output_dir": str(run), "deepspeed_config": "", "method": "lora", "train.num_steps": 2}
    overrides = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    unpruned = ["--set", "schedule.final_sparsity=0.0"]
    assert main(["train", "tests/data/world_size.toml", "--quiet", *overrides, *unpruned]) == 0
    capsys.readouterr()
    assert main(["export", str(run), "--for", "cpu", "--out", str(out), "--quiet"]) == 0, capsys.readouterr().err
    chosen = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("--")]
    assert chosen == ["--format onnx", "--plain"]
    assert main(["verify", str(out), "--against", str(run)]) == 0
