"""``--reference`` of eval and verify: the divergence from the model of a folder, against torch's distributions."""

from __future__ import annotations

import json

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.run import prepare
from tests.cli.test_export_quantized import said_by

BASE = "tests/data/tiny-llama"
ONE_TEXT = ("--set", "data.document_mask=false")
"""Documents see each other, as in a model that is called without positions."""


@torch.no_grad()
def _rows(reference, model, run):
    """The divergence of each next-token distribution of the run's test split, in float64."""
    context, found = prepare(load_run(run / "run.toml"), launch_environment()), []
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (reference, model)]
    examples = context.load("test")
    for index in range(len(examples)):
        ids = context.task.collate(examples, [index], context.tokenizer)["input_ids"]
        p, q = (Categorical(logits=one(input_ids=ids).logits[0, :-1].double()) for one in models)
        found.append(kl_divergence(p, q))
    return torch.cat(found)


def test_eval_measures_the_distance_from_a_folder(folders, capsys):
    run = folders / "run"
    said, printed = said_by(capsys, "eval", run, "--reference", BASE, *ONE_TEXT)
    wanted = _rows(BASE, folders / "dense", run)
    assert said["kl_mean"] == pytest.approx(float(wanted.mean()), rel=1e-3)
    high = wanted.sort().values[-(len(wanted) // 100) - 1]
    assert said["kl_p99"] == pytest.approx(float(high), rel=1e-3)
    assert 0.0 < said["same_top"] < 1.0
    assert f"from {BASE}: KL divergence {said['kl_mean']:.3g}" in printed
    plain, _ = said_by(capsys, "eval", run, *ONE_TEXT)
    assert plain["perplexity"] == pytest.approx(said["perplexity"], rel=1e-6)


def test_a_run_has_no_distance_from_its_exports(folders, capsys):
    for export in ("dense", "bitmask"):
        said, _ = said_by(capsys, "eval", folders / "run", "--reference", folders / export)
        assert abs(said["kl_mean"]) < 1e-6
        assert said["same_top"] > 0.99


@pytest.mark.parametrize("layout", ["bitmask", pytest.param("onnx", marks=pytest.mark.thorough)])
def test_verify_measures_what_quantisation_changed(folders, tmp_path, capsys, layout):
    out, against = tmp_path / "out", ["--against", folders / "run", *ONE_TEXT]
    said_by(capsys, "export", folders / "run", "--format", layout, "--values", "int4", "--group", "row", "--out", out)
    said, printed = said_by(capsys, "verify", out, *against, "--reference", folders / "dense")
    assert said["kl"]["kl_mean"] > 1e-4
    assert said["kl"]["kl_mean"] == pytest.approx(said["kl_from_reference"]["kl_mean"], rel=1e-3)
    assert "from the trained model: KL divergence" in printed
    if layout == "bitmask":
        wanted = _rows(folders / "dense", out, folders / "run")
        assert said["kl"]["kl_mean"] == pytest.approx(float(wanted.mean()), rel=1e-3)
    exact, _ = said_by(capsys, "verify", folders / "dense", *against)
    assert "kl" not in exact


def test_models_that_cannot_be_compared(folders, tmp_path, capsys):
    other = tmp_path / "other"
    said_by(capsys, "export", folders / "dense", "--vocabulary", _few(tmp_path), "--out", other)
    small, whole = (json.loads((at / "config.json").read_text())["vocab_size"] for at in (other, folders / "dense"))
    assert main(["eval", str(folders / "run"), "--reference", str(other)]) == 2
    said = capsys.readouterr().err
    assert f"--reference {other} has a vocabulary of {small} tokens" in said
    assert f"one of {whole}" in said
    trimmed = tmp_path / "trimmed"
    said_by(capsys, "export", folders / "run", "--vocabulary", _few(tmp_path), "--out", trimmed)
    assert main(["verify", str(trimmed), "--against", str(folders / "run"), "--reference", BASE]) == 2
    assert f"has {small:,} of {whole:,} tokens" in capsys.readouterr().err
    assert main(["verify", str(trimmed), "--reference", BASE]) == 2
    assert "Add --against RUN" in capsys.readouterr().err


def _few(tmp_path):
    (tmp_path / "few.txt").write_text("the film\n")
    return tmp_path / "few.txt"
