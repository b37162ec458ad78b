"""``pst-ds prune`` from a run file to a folder that transformers loads and ``export`` packs, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForPreTraining

from pst_ds.atomic_files import file_sha256
from pst_ds.checkpoint.restore import base_fingerprint
from pst_ds.cli.main import main
from pst_ds.config.pst import PSTConfig
from pst_ds.core.patterns import parse_pattern
from pst_ds.nn.targets import resolve_targets
from pst_ds.prune.model_files import ModelFiles
from pst_ds.train.one_shot import pruning
from tests.core.one_shot_references import keep_by_score
from tests.pairs import every_pair

CAUSAL, CLASSES = "tests/data/causal_lm.toml", "tests/data/world_size.toml"
DATA = Path(__file__).resolve().parents[1] / "data"
FORMATS = {"matrix": "bitmask", "row": "bitmask", "2:4": "2:4", "4:8": "bitmask", "4x2": "bitmask"}


def _prune(capsys, out, run_file, method, *arguments):
    capsys.readouterr()
    command = ["prune", run_file, "--method", method, "--out", str(out), "--samples", "12", "--json", *arguments]
    assert main(command) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def _refused(capsys, tmp_path, *arguments, run_file=CAUSAL, method="wanda"):
    """The one line on stderr of a verb that ends with exit code 2 and leaves nothing."""
    capsys.readouterr()
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert main(["prune", str(run_file), "--method", method, "--samples", "12", *out, *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))
    (line,) = [line for line in said.err.splitlines() if line.startswith("pst-ds prune: ")]
    return line


def test_the_cpu_is_used_when_deepspeed_is_told_so(capsys, tmp_path, monkeypatch):
    used, prune_files = [], pruning.prune_files

    def seen(*arguments):
        used.append(arguments[-1].device.type)
        return prune_files(*arguments)

    monkeypatch.setattr(pruning, "prune_files", seen)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for accelerator in (torch.accelerator, torch.cuda):
        monkeypatch.setattr(accelerator, "is_available", lambda: True)
    _prune(capsys, tmp_path / "out", CAUSAL, "wanda")
    assert used == ["cpu"]


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("method", "pattern", "sparsity"),
    [("magnitude", "matrix", 0.6), ("wanda", "row", 0.5), ("wanda", "2:4", 0.5), ("sparsegpt", "row", 0.7),
     ("sparsegpt", "2:4", 0.5), ("sparsegpt", "matrix", 0.3), ("alps", "row", 0.7), ("alps", "4x2", 0.5)],
)  # fmt: skip
def test_a_causal_model_is_pruned_exported_and_verified(capsys, tmp_path, method, pattern, sparsity):
    asked = [] if ":" in pattern else ["--sparsity", str(sparsity)]
    result = _prune(capsys, tmp_path / "out", CAUSAL, method, "--pattern", pattern, *asked)
    model, base = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "out", DATA / "tiny-llama"))
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())

    assert (record["method"], record["pattern"], record["sparsity_requested"]) == (method, pattern, sparsity)
    assert record["base_fingerprint"] == base_fingerprint(DATA / "tiny-llama")
    if method != "magnitude":
        assert (record["samples"], record["tokens"], record["seed"]) == (12, 12 * 32, 0)
    targets = {target.name: target for target in resolve_targets(base, PSTConfig())}
    assert [layer["name"] for layer in record["layers"]] == list(targets)
    weights = dict(model.named_parameters())
    for layer in record["layers"]:
        weight = weights[f"{layer['name']}.weight"]
        outputs, inputs = weight.shape
        expected = {"matrix": int(sparsity * outputs * inputs), "row": outputs * int(sparsity * inputs)}
        assert int((weight == 0).sum()) == layer["pruned"] == layer["zeros"]
        assert layer["pruned"] == expected.get(pattern, outputs * inputs // 2)
        assert bool((weight[weight == 0].view(torch.int32) == 0).all())  # +0.0
    for name, param in base.named_parameters():
        if name.removesuffix(".weight") not in targets:
            assert torch.equal(param, weights[name]), name
    assert result["sparsity_measured"] == record["sparsity_measured"] == pytest.approx(sparsity, abs=0.02)

    packed = tmp_path / "packed"
    assert main(["export", str(tmp_path / "out"), "--format", FORMATS[pattern], "--out", str(packed)]) == 0
    assert main(["verify", str(packed)]) == 0
    assert main(["export", str(packed), "--format", "dense", "--out", str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(packed)("the film").input_ids


def test_a_magnitude_mask_is_that_of_training(capsys, tmp_path):
    _prune(capsys, tmp_path / "out", CAUSAL, "magnitude", "--sparsity", "0.37")
    model, base = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "out", DATA / "tiny-llama"))
    for one, two in zip(resolve_targets(model, PSTConfig()), resolve_targets(base, PSTConfig()), strict=True):
        keep = keep_by_score(two.module.weight.abs(), two.layout, parse_pattern("matrix"), 0.37)
        assert torch.equal(one.module.weight, two.module.weight * keep)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_encoder_keeps_its_architecture_and_needs_no_head(capsys, tmp_path, method):
    result = _prune(capsys, tmp_path / "out", CLASSES, method)
    assert result["sparsity_requested"] == 0.8  # schedule.final_sparsity
    assert 12 * 5 < result["tokens"] < 12 * 32  # padding is not counted
    assert AutoConfig.from_pretrained(tmp_path / "out").architectures == ["BertModel"]
    base, pruned = (load_file(folder / "model.safetensors") for folder in (DATA / "tiny-bert", tmp_path / "out"))
    assert {name: tensor.shape for name, tensor in base.items()} == {n: tensor.shape for n, tensor in pruned.items()}
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, pruned[name])}
    assert len(changed) == 12
    assert AutoModel.from_pretrained(tmp_path / "out").encoder.layer[1].output.dense.weight.eq(0).any()
    settings = _sets(tmp_path, "deepspeed_config=", "train.num_steps=2", _model_path(tmp_path / "out"))
    assert main(["train", CLASSES, "--quiet", *settings]) == 0


def _model_path(folder):
    return f"model.path={json.dumps(str(folder))}"


def _sets(tmp_path, *settings):
    settings = (f"output_dir={json.dumps(str(tmp_path / 'run'))}", *settings)
    return [word for setting in settings for word in ("--set", setting)]


@every_pair
@pytest.mark.parametrize("family", ["gpt2", "opt", "roberta"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_other_families_and_files_of_any_number(capsys, tmp_path, tiny, family, method):
    """In many weight files before and after; GPT-2 stores (I, O), with q, k and v in one weight; tied heads stay."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "base", max_shard_size=20_000)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DATA / "tiny-bert" / name, tmp_path / "base" / name)
    options = ["--pattern", "2:4", "--shard-bytes", "30000", "--set", _model_path(tmp_path / "base")]
    if family != "roberta":
        options += ["--set", "model.tokenizer=tests/data/tiny-llama"]
    before = {path: file_sha256(path) for path in (tmp_path / "base").iterdir()}
    run_file = CLASSES if family == "roberta" else CAUSAL
    extra = ["--set", "data.max_length=24"] if family == "roberta" else []
    result = _prune(capsys, tmp_path / "out", run_file, method, *options, *extra)
    assert result["num_layers"] == {"gpt2": 12, "opt": 18, "roberta": 18}[family]
    assert {path: file_sha256(path) for path in (tmp_path / "base").iterdir()} == before
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    pruned, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for target in resolve_targets(pruned, PSTConfig()):
        weight = target.module.weight.t() if target.layout.transposed else target.module.weight
        assert bool((weight.reshape(len(weight), -1, 4).eq(0).sum(2) == 2).all())
    assert main(["export", str(tmp_path / "out"), "--format", "2:4", "--out", str(tmp_path / "packed")]) == 0
    assert main(["verify", str(tmp_path / "packed")]) == 0


def test_the_seed_chooses_the_examples(capsys, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        _prune(capsys, tmp_path / name, CAUSAL, "wanda", "--seed", seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_the_precision_is_the_runs_and_the_dtype_the_models(capsys, tmp_path):
    _prune(capsys, tmp_path / "fp32", CAUSAL, "sparsegpt")
    _prune(capsys, tmp_path / "bf16", CAUSAL, "sparsegpt", "--set", "train.precision=bf16")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    assert {tensor.dtype for tensor in two.values()} == {torch.float32}
    assert not torch.equal(one["model.layers.1.mlp.down_proj.weight"], two["model.layers.1.mlp.down_proj.weight"])
    names = [name for name in one if name.endswith("_proj.weight")]
    agree = sum(int(((one[name] == 0) == (two[name] == 0)).sum()) for name in names)
    assert agree > 0.95 * sum(one[name].numel() for name in names)


def test_an_older_result_is_replaced_and_other_folders_are_not(capsys, tmp_path):
    _prune(capsys, tmp_path / "a", CAUSAL, "magnitude")
    assert _prune(capsys, tmp_path / "a", CAUSAL, "magnitude", "--sparsity", "0.25")["sparsity_requested"] == 0.25
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "exists and was not written by pst-ds prune" in _refused(capsys, tmp_path, "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert main(["export", str(tmp_path / "a"), "--out", str(tmp_path / "export")]) == 0
    assert "was not written by pst-ds prune" in _refused(capsys, tmp_path, "--out", tmp_path / "export")
    itself = ("--set", _model_path(tmp_path / "a"), "--out", tmp_path / "a")
    assert "is the model to prune" in _refused(capsys, tmp_path, *itself)


def test_wrong_input_is_one_message(capsys, tmp_path):
    def said(*arguments, **more):
        return _refused(capsys, tmp_path, *arguments, **more)

    assert "--sparsity 1.5 must be in [0, 1)" in said("--sparsity", "1.5")
    assert "pattern 2:4 has sparsity 0.5" in said("--pattern", "2:4", "--sparsity", "0.6")
    assert "4:8: " not in said("--pattern", "4:9")
    assert "model.layers.0.mlp.down_proj: pattern 4:8 needs in_features divisible by 8, got 60" in said(
        "--pattern", "4:8"
    )
    assert 'pattern "global" ranks the weights of several matrices' in said("--pattern", "global", method="magnitude")
    assert "SparseGPT prunes by matrix, row or N:M" in said("--pattern", "2x2", method="sparsegpt")
    assert ", or lower data.max_length" in said("--samples", "99999")
    assert "does not exist (looked in" in said("--set", "model.path=nowhere/at/all", method="magnitude")
    assert "run file 'nothing.toml' does not exist" in said(run_file="nothing.toml")
    assert "matched no linear layer" in said("--set", "pst.target_modules=['nothing']")


def _base_of_class(folder, name):
    base = Path(shutil.copytree(DATA / "tiny-bert", folder / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    return base


def test_a_model_that_lacks_weights_is_refused(capsys, tmp_path):
    base = _base_of_class(tmp_path, "BertForPreTraining")
    line = _refused(capsys, tmp_path, "--set", _model_path(base), run_file=CLASSES)
    assert "lacks cls.predictions" in line
    assert "which a BertForPreTraining has" in line


def test_a_sentence_encoder_may_name_the_masked_language_model_whose_head_it_lacks(capsys, tmp_path):
    """As all-mpnet-base-v2 does."""
    _prune(capsys, tmp_path / "named", CLASSES, "wanda", "--set", _model_path(DATA / "tiny-bert"))
    base = _base_of_class(tmp_path, "BertForMaskedLM")
    _prune(capsys, tmp_path / "out", CLASSES, "wanda", "--set", _model_path(base))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]
    named, out = (load_file(tmp_path / name / "model.safetensors") for name in ("named", "out"))
    assert named.keys() == out.keys()
    assert all(torch.equal(named[name], out[name]) for name in named)


def test_weights_that_the_named_class_has_not_are_kept(capsys, tmp_path):
    """A BERT of masked language modelling has no pooler, and its files have one, which classifiers begin with."""
    config = BertConfig.from_pretrained(DATA / "tiny-bert")
    torch.manual_seed(0)
    BertForPreTraining(config).save_pretrained(tmp_path / "base", max_shard_size=20_000)
    written = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**written, "architectures": ["BertForMaskedLM"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DATA / "tiny-bert" / name, tmp_path / "base" / name)
    _prune(capsys, tmp_path / "out", CLASSES, "magnitude", "--set", _model_path(tmp_path / "base"))
    before, after = (BertForPreTraining.from_pretrained(tmp_path / name).state_dict() for name in ("base", "out"))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert "bert.pooler.dense.weight" in before
    assert len(changed) == 12
    assert all("layer." in name for name in changed)


def test_a_packed_folder_is_refused(capsys, tmp_path):
    _prune(capsys, tmp_path / "zeros", CAUSAL, "magnitude")
    assert main(["export", str(tmp_path / "zeros"), "--format", "bitmask", "--out", str(tmp_path / "packed")]) == 0
    line = _refused(capsys, tmp_path, "--set", _model_path(tmp_path / "packed"))
    assert "is packed, and its weights cannot be ranked" in line
    assert f"pst-ds export {tmp_path / 'packed'} --format dense" in line


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "magnitude"),
        ("--method", "alps", "--budgets", "saliency", "--reconstruct", "1", "--samples", "12"),
        ("--method", "sparsegpt", "--bits", "4", "--group", "row", "--samples", "12"),
    ],
)
def test_a_prune_that_is_killed_at_any_block_ends_with_the_same_files(tmp_path, monkeypatch, options):
    command = ["prune", CAUSAL, *options, "--set", "train.precision=bf16", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    finish, finished = ModelFiles.finish, []

    def killed(files, part, layers):
        finish(files, part, layers)
        finished.append(part)
        raise OSError("no space left on device")

    for _ in range(2):  # the model has two blocks
        monkeypatch.setattr(ModelFiles, "finish", killed)
        assert main([*command, str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists()
        monkeypatch.setattr(ModelFiles, "finish", finish)
    monkeypatch.setattr("pst_ds.train.one_shot.pruning.copy_small_files", lambda *_: 1 / 0)
    assert main([*command, str(tmp_path / "out")]) == 1  # while the finished folder is written
    monkeypatch.undo()
    assert main([*command, str(tmp_path / "out")]) == 0
    assert finished == ["model.layers.0", "model.layers.1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == files
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


def test_blocks_of_other_settings_are_not_kept(tmp_path, monkeypatch):
    command = ["prune", CAUSAL, "--out", str(tmp_path / "out"), "--method", "magnitude", "--sparsity"]
    with monkeypatch.context() as patch:
        patch.setattr("pst_ds.train.one_shot.pruning.copy_small_files", lambda *_: 1 / 0)
        assert main([*command, "0.5"]) == 1
    assert main([*command, "0.25"]) == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert {layer["sparsity_requested"] for layer in record["layers"]} == {0.25}
