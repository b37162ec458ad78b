"""Models whose files hold other names or shapes than the model does: the export has the files' form."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, conversion_mapping
from transformers.core_model_loading import Concatenate, Transpose, WeightConverter, WeightRenaming

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.nn.targets import CannotBePrunedError
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.run import prepare, train_prepared

RENAMED = [WeightRenaming("intermediate.wide", "intermediate.dense")]
HALVES = ["output.upper.weight", "output.lower.weight"]
SPLIT = [WeightConverter(HALVES, "output.dense.weight", operations=[Concatenate(dim=0)])]
TURNED = "attention.output.turned.weight"
TRANSPOSED = [WeightConverter(TURNED, "attention.output.dense.weight", operations=[Transpose(0, 1)])]


@pytest.fixture
def converted(monkeypatch, tmp_path):
    """``converted(transforms)`` trains a BERT whose files transformers converts so; the base file's tensors."""

    def train(transforms):
        conversion_mapping.get_checkpoint_conversion_mapping("bert")  # makes the table
        monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "bert", transforms)
        torch.manual_seed(2)
        config = BertConfig(
            vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=37,
            max_position_embeddings=48, initializer_range=0.2,
        )  # fmt: skip
        BertModel(config).save_pretrained(tmp_path / "base")
        settings = {
            "output_dir": str(tmp_path / "run"), "model.path": str(tmp_path / "base"), "deepspeed_config": "",
            "model.tokenizer": "tests/data/tiny-bert", "train.num_steps": 3,
        }  # fmt: skip
        run = load_run("tests/data/world_size.toml", [f"{k}={json.dumps(v)}" for k, v in settings.items()])
        train_prepared(prepare(run, launch_environment()), quiet=True)
        return load_file(tmp_path / "base" / "model.safetensors")

    return train


def test_a_pruned_tensor_keeps_the_name_it_has_in_the_files(converted, tmp_path):
    base = converted(RENAMED)
    assert "encoder.layer.0.intermediate.wide.weight" in base
    out = tmp_path / "export"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--against", str(tmp_path / "run")]) == 0
    exported = load_file(out / "model.safetensors")
    weight = exported["bert.encoder.layer.0.intermediate.wide.weight"]
    assert int((weight == 0).sum()) == int(0.8 * weight.numel())
    bias = "encoder.layer.0.intermediate.wide.bias"
    assert torch.equal(exported[f"bert.{bias}"], base[bias])
    assert not any("intermediate.dense" in name for name in exported)


BOTH = ["attention.output.dense", "output.dense"]
OTHER_FORMS = {
    "in parts": (SPLIT, "output.upper.weight", BOTH, "output"),
    "transposed": (TRANSPOSED, "attention.output.turned.weight", BOTH[:1], "attention.output"),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_layer_that_the_files_hold_otherwise_is_refused_by_name_before_training(converted, tmp_path, form):
    transforms, in_file, layers, place = OTHER_FORMS[form]
    with pytest.raises(CannotBePrunedError) as refusal:
        converted(transforms)
    assert f"encoder.layer.0.{in_file}" in load_file(tmp_path / "base" / "model.safetensors")
    named = ", ".join(f"bert.encoder.layer.0.{layer}.weight" for layer in layers)
    assert str(refusal.value).startswith(f"{named}: transformers saves each fused with others, in parts or transposed")
    # intermediate.dense can be pruned, and is not excluded with them
    assert str(refusal.value).endswith(f'exclude_modules = ["{place}.dense"]')
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_run_that_was_trained_with_such_a_layer_is_not_exported(converted, tmp_path, capsys, monkeypatch, form):
    """Runs of earlier versions have them."""
    monkeypatch.setattr("pst_ds.nn.targets._refuse_fused_in_files", lambda model, targets: None)
    converted(OTHER_FORMS[form][0])
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 2
    assert "output.dense.weight is built from" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()
