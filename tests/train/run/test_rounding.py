"""A run with [quantization]: from when on it rounds, what it reports, and that its file computes what was trained."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import pst_ds.hf  # noqa: F401 (teaches transformers the format)
from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.core.quantization import Rounding, dequantize, grid_of, quantize
from pst_ds.errors import InputError
from pst_ds.nn.base_model import DTYPES
from pst_ds.nn.inject import pst_layers, round_weights
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.run import masked_model, prepare, prepare_single, train_prepared
from pst_ds.train.run_folder import open_trained

STEPS, START, INTERVAL = 12, 6, 4
INT4 = ('quantization.values="int4"', 'quantization.group="row"')
METHODS = {
    "pst": (),
    "gmp": ("method=gmp",),
    "lora": ("method=lora", "schedule.cooldown_fraction=0.0", "train.update_learning_rate=0.1"),
    "dense": ("method=dense", "train.head_learning_rate=1e-3"),
    "int8": ('quantization.values="int8"',),
    "groups": ("quantization.group=32", 'pst.exclude_modules=["output.dense"]'),
    "2:4": ('pst.pattern="2:4"', "schedule.final_sparsity=0.5"),
}
PACKINGS = {"2:4": "2:4", "lora": "dense", "dense": "dense"}


def _run(folder, *more):
    return load_run(
        "tests/data/world_size.toml",
        [
            f"output_dir={json.dumps(str(folder))}", "deepspeed_config=", f"train.num_steps={STEPS}",
            "schedule.cooldown_fraction=0.5", f"quantization.interval={INTERVAL}", "eval.interval=3",
            "checkpoint.interval=3", "checkpoint.keep_last=10", *INT4, *more,
        ],
    )  # fmt: skip


def _trained(folder, *more):
    run = _run(folder, *more)
    train_prepared(prepare(run, launch_environment()), quiet=True)
    return run


def _lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def _checkpoint(folder, name="final"):
    return read_checkpoint((folder / "checkpoints" / name).resolve())


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("method", "precision"), [*((method, "fp32") for method in METHODS), ("pst", "bf16"), ("int8", "bf16")]
)
def test_the_exported_file_computes_what_was_trained(tmp_path, method, precision):
    """Codes and scales are those of the training, and loaded they are the trained model's weights."""
    folder, out = tmp_path / "run", tmp_path / "out"
    run, packing = _trained(folder, *METHODS[method], f"train.precision={precision}"), PACKINGS.get(method, "bitmask")
    checkpoint = _checkpoint(folder)
    grid = grid_of(run.quantization.values, run.quantization.group)
    assert checkpoint.state.rounds
    assert checkpoint.contents.grid == (grid.bits, grid.group or 0)
    model = masked_model(prepare_single(open_trained(run, checkpoint)[0]), checkpoint)
    assert main(["export", str(folder), "--checkpoint", "final", "--format", packing, "--out", str(out)]) == 0
    (file,) = out.glob("*.safetensors")
    stored = load_file(file)
    loaded = AutoModelForSequenceClassification.from_pretrained(out, dtype=DTYPES[precision])
    for name, layer in pst_layers(model).items():
        trained, scales = layer.masked_weight().detach(), checkpoint.scales[name]
        assert torch.equal(layer.rounding().scales, scales)
        assert torch.equal(stored[f"{name}.scales"], scales)
        codes, of_file = Rounding(layer.stored_grid, scales).codes(trained)
        assert torch.equal(dequantize(codes, of_file, trained.dtype), trained), name
        assert torch.equal(loaded.get_submodule(name).weight, trained), name
        round_weights(model, rounds=False)
        unrounded = layer.masked_weight().detach()
        round_weights(model)
        assert torch.equal(quantize(unrounded, None, grid, of_file)[0], codes), "codes of the weight before rounding"
        assert not torch.equal(unrounded, trained)


def test_what_is_exported_of_a_run_that_rounds(tmp_path, capsys):
    """Its own grid, another one, plain numbers, and layers that it did not round."""
    run = _trained(tmp_path / "run", 'pst.exclude_modules=["output.dense"]')
    export = ["export", str(tmp_path / "run"), "--checkpoint", "final", "--out"]
    assert main([*export, str(tmp_path / "own"), "--embeddings", "int8"]) == 0
    stored = load_file(tmp_path / "own" / "pst_dense.safetensors")
    layers = set(_checkpoint(tmp_path / "run").scales)
    assert {name.removesuffix(".codes") for name in stored if name.endswith("dense.codes")} <= layers
    assert "bert.encoder.layer.0.output.dense.weight" in stored
    assert "bert.embeddings.word_embeddings.codes" in stored
    assert main(["verify", str(tmp_path / "own"), "--against", str(tmp_path / "run"), "--checkpoint", "final"]) == 0
    assert main([*export, str(tmp_path / "plain"), "--dtype", "fp32"]) == 0
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    checkpoint = _checkpoint(tmp_path / "run")
    model = masked_model(prepare_single(open_trained(run, checkpoint)[0]), checkpoint)
    for name, layer in pst_layers(model).items():
        assert torch.equal(plain[f"{name}.weight"], layer.masked_weight()), name
    assert main(["verify", str(tmp_path / "plain"), "--against", str(tmp_path / "run"), "--checkpoint", "final"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(checkpoint.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rounded_to"] == "int4, a scale for every row"
    assert main([*export, str(tmp_path / "csr"), "--format", "csr"]) == 0
    assert main([*export, str(tmp_path / "same"), "--values", "int4", "--group", "row"]) == 0
    for_vllm = [str(tmp_path / "vllm"), "--format", "compressed-tensors", "--values", "int4", "--group", "row"]
    assert main([*export, *for_vllm]) == 0
    assert main(["verify", str(tmp_path / "vllm")]) == 0
    capsys.readouterr()
    assert main([*export, str(tmp_path / "other"), "--values", "int8"]) == 2
    assert "a scale for every row. Quantising again loses accuracy" in capsys.readouterr().err
    before = ["export", str(tmp_path / "run"), "--checkpoint", "step-00000003", "--out", str(tmp_path / "before")]
    assert main([*before, "--values", "int8"]) == 0  # not rounded yet


def test_it_rounds_once_masks_are_final_and_reports_what_is_lost(tmp_path):
    run = _trained(tmp_path)
    lines = _lines(tmp_path)
    rounding = [line for line in lines if line["event"] == "rounding"]
    assert [line["step"] for line in rounding] == [START, START + INTERVAL]
    assert all(0.02 < line["rounding_error"] < 0.3 for line in rounding)
    layers = [line for line in _lines(tmp_path, "layers.jsonl") if line.get("event") == "rounding"]
    assert [line["step"] for line in layers] == [START, START + INTERVAL]
    assert len(layers[0]["error"]) == 12
    assert max(layers[0]["error"]) >= rounding[0]["rounding_error"] >= min(layers[0]["error"])
    assert [_checkpoint(tmp_path, f"step-{step:08d}").state.rounds for step in (3, 6, 9, 12)] == [False, *[True] * 3]
    assert _checkpoint(tmp_path, "best").state.step >= START
    assert run.make_schedules(STEPS).rounding.start == START


def test_the_best_checkpoint_is_a_rounded_one(tmp_path):
    _trained(tmp_path, "quantization.start_fraction=0.8")
    assert [line["step"] for line in _lines(tmp_path) if line["event"] == "rounding"] == [9]
    assert _checkpoint(tmp_path, "best").state.step >= 9
    assert not _checkpoint(tmp_path, "step-00000006").state.rounds


@pytest.mark.thorough
def test_without_quantization_a_run_is_as_before(tmp_path):
    _trained(tmp_path / "grid")
    plain = load_run(
        "tests/data/world_size.toml",
        [f"output_dir={json.dumps(str(tmp_path / 'plain'))}", "deepspeed_config=", f"train.num_steps={STEPS}",
         "schedule.cooldown_fraction=0.5", "eval.interval=3"],
    )  # fmt: skip
    train_prepared(prepare(plain, launch_environment()), quiet=True)
    losses = [[line["loss"] for line in _lines(tmp_path / f) if line["event"] == "step"] for f in ("grid", "plain")]
    assert losses[0][:START] == losses[1][:START]
    assert losses[0][START:] != losses[1][START:]
    checkpoint = _checkpoint(tmp_path / "plain")
    assert (checkpoint.contents.grid, dict(checkpoint.scales), checkpoint.state.rounds) == (None, {}, False)


def test_groups_that_do_not_divide_a_layer_name_it(tmp_path):
    with pytest.raises(
        InputError, match=r"encoder.layer.0.output.dense: groups of 32 do not divide 60 inputs; take row"
    ):
        prepare(_run(tmp_path, "quantization.group=32"), launch_environment())


def test_another_grid_does_not_go_on(tmp_path):
    _trained(tmp_path)
    changed = _run(tmp_path, 'quantization.values="int8"')
    with pytest.raises(ConfigError, match=r"quantization.values = \'int8\': the run in .* has \'int4\'"):
        train_prepared(prepare(changed, launch_environment()), resume=True, quiet=True)


def test_scales_of_a_checkpoint_that_there_cannot_be_are_not_exported(tmp_path, capsys):
    """Their sums are right, as somebody else's program would write them."""
    _trained(tmp_path / "run")
    folder = (tmp_path / "run" / "checkpoints" / "final").resolve()
    (path,) = folder.glob("shard-*.safetensors")
    tensors = load_file(path)
    tensors["scales"].view(torch.bfloat16)[0] = float("inf")
    save_file(tensors, path)
    sums = (folder / "SHA256SUMS").read_text().splitlines()
    others = [line for line in sums if not line.endswith(path.name)]
    mine = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}"
    (folder / "SHA256SUMS").write_text("".join(f"{line}\n" for line in [*others, mine]))
    for words in (["--format", "bitmask"], ["--dtype", "fp32"]):
        capsys.readouterr()
        export = ["export", str(tmp_path / "run"), "--checkpoint", "final", "--out", str(tmp_path / "out"), *words]
        assert main(export) == 2
        (line,) = [said for said in capsys.readouterr().err.splitlines() if said.startswith("pst-ds")]
        assert f"{folder}: " in line
        assert "encoder.layer.0.attention.self.query: scale 0 is inf; scales are at least 2^-126" in line
        assert not (tmp_path / "out").exists()
