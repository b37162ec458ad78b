"""Families of models from the pretrained folder to the reloaded export, on two ZeRO-3 ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.resolved import dropout_of, load_model_config, load_tokenizer, set_dropout
from pst_ds.train.run import prepare, train_prepared

SPARSITY = 0.7
_ENCODER = {
    "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37,
    "max_position_embeddings": 48, "initializer_range": 0.2,
}  # fmt: skip
_ODD = {**_ENCODER, "hidden_size": 27, "num_attention_heads": 3}
"""No weight of 27 x 27 or 27 x 37 divides by two ranks: the last shard is padded."""
_DECODER = {**_ODD, "head_dim": 8, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}
FAMILIES = {
    "bert": ("BertModel", _ENCODER, 12, "classifier"),
    "roberta": ("RobertaModel", {**_ENCODER, "type_vocab_size": 1, "pad_token_id": 0}, 12, "classifier"),
    "gpt2": ("GPT2Model", {"vocab_size": 60, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 48,
                           "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2}, 8, "score"),
    "llama": ("LlamaModel", {**_ENCODER, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3}, 14, "score"),
    "distilbert": ("DistilBertModel", {"vocab_size": 60, "dim": 27, "n_layers": 2, "n_heads": 3, "hidden_dim": 37,
                                       "max_position_embeddings": 48, "initializer_range": 0.2},
                   12, "pre_classifier classifier"),
    "electra": ("ElectraModel", {**_ODD, "embedding_size": 15}, 12, "classifier"),
    "deberta_v2": ("DebertaV2Model", {**_ODD, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                                      "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
                                      "position_biased_input": False, "type_vocab_size": 0}, 12, "pooler classifier"),
    "deberta": ("DebertaModel", {**_ODD, "relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                                 "type_vocab_size": 0}, 12, "pooler classifier"),
    "falcon": ("FalconModel", {**_ENCODER, "num_kv_heads": 1, "new_decoder_architecture": True, "bias": True,
                               "bos_token_id": 2, "eos_token_id": 3}, 8, "score"),
    "opt": ("OPTModel", {"vocab_size": 60, "hidden_size": 27, "num_hidden_layers": 2, "num_attention_heads": 3,
                         "ffn_dim": 37, "word_embed_proj_dim": 15, "max_position_embeddings": 48, "init_std": 0.2,
                         "bos_token_id": 2, "eos_token_id": 3}, 12, "score"),
    "gpt_neox": ("GPTNeoXModel", {**_ODD, "bos_token_id": 2, "eos_token_id": 3}, 8, "score"),
    "qwen2": ("Qwen2Model", {**_ENCODER, "num_key_value_heads": 1, "intermediate_size": 37}, 14, "score"),
    "qwen3": ("Qwen3Model", _DECODER, 14, "score"),
    "gemma": ("GemmaModel", _DECODER, 14, "score"),
    "phi": ("PhiModel", {**_ODD, "bos_token_id": 2, "eos_token_id": 3}, 12, "score"),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 60, "d_model": 27, "d_kv": 9, "num_heads": 3, "d_ff": 37,
                                          "num_layers": 1, "eos_token_id": 3, "decoder_start_token_id": 0,
                                          "initializer_factor": 0.5}, 16, "classification_head"),
    "mixtral": ("MixtralModel", {**_ENCODER, "num_local_experts": 3, "intermediate_size": 16,
                                 "num_key_value_heads": 1}, 8, "score"),
}  # fmt: skip
"""Of each family: class its base checkpoint is saved from, config, how many tensors are pruned, modules of the head."""

LEFT_DENSE = {"mixtral": ["experts"]}


def _write_base(family, folder):
    class_name, config, *_ = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(1)
    model_class(model_class.config_class(**config)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-bert", model_input_names=["input_ids", "attention_mask"])
    tokenizer.save_pretrained(folder)


def _settings(folder, **more):
    settings = {
        "output_dir": str(folder / "run"), "model.path": str(folder / "base"), "train.num_steps": 6,
        "schedule.final_sparsity": SPARSITY, "schedule.update_interval": 1, "train.precision": "bf16", **more,
    }  # fmt: skip
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def _train(settings):
    run = load_run("tests/data/world_size.toml", settings)
    return train_prepared(prepare(run, launch_environment()), quiet=True)


def _train_alone(settings):
    return _train([*settings, 'deepspeed_config=""'])


@pytest.mark.zero3
@pytest.mark.parametrize(
    ("family", "checkpointing", "updated"),
    [
        ("bert", False, []),
        ("bert", True, ["bert.embeddings.word_embeddings"]),
        ("roberta", False, ["roberta.embeddings.word_embeddings", "roberta.embeddings.position_embeddings"]),
        ("gpt2", False, ["transformer.wte"]),
        ("llama", False, []),
        ("llama", True, ["model.embed_tokens"]),
        ("distilbert", False, []),
        ("electra", False, []),
        ("deberta_v2", False, []),
        ("opt", False, []),
        ("gpt_neox", False, []),
        ("qwen2", False, []),
        ("qwen3", False, []),
        ("gemma", False, []),
        ("phi", False, []),
        ("t5", False, []),
        ("mixtral", True, []),
    ],
)
@pytest.mark.few(2)
def test_family_from_base_to_reloaded_export(run_ranks, tmp_path, family, checkpointing, updated, capsys):
    _write_base(family, tmp_path / "base")
    settings = _settings(tmp_path, **{"model.gradient_checkpointing": checkpointing, "pst.update_embeddings": updated,
                                      "pst.exclude_modules": LEFT_DENSE.get(family, [])})  # fmt: skip
    first, second = run_ranks(_train, 2, settings)
    assert first == second | {"seconds": first["seconds"]}
    out = tmp_path / "export"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--against", str(tmp_path / "run"), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert verified["max_logit_difference"] == 0.0
    # one process, plain transformers, against two ZeRO-3 ranks: rounding may turn an example or two
    assert verified["metrics"] == pytest.approx(first["metrics"], abs=0.08)
    assert verified["compared_weights"] == FAMILIES[family][2] + len(updated)

    manifest = json.loads((out / "pst_manifest.json").read_text())
    pruned = [t for t in manifest["tensors"] if t["origin"] == "pruned"]
    assert len(pruned) == FAMILIES[family][2]
    exported = load_file(out / "model.safetensors")
    for entry in pruned:
        for matrix in exported[entry["name"]].chunk(len(entry["pruned_per_matrix"]), dim=entry["matrix_axis"]):
            assert int((matrix == 0).sum()) == math.floor(SPARSITY * matrix.numel()), entry["name"]
    base = load_file(tmp_path / "base" / "model.safetensors")
    trained = [t["name"] for t in manifest["tensors"] if t["origin"] == "trained"]
    heads = FAMILIES[family][3].split()
    assert {name.split(".")[0] for name in trained} >= set(heads)
    others = [name for name in trained if name.split(".")[0] not in heads and ".pooler." not in name]
    assert others == [f"{name}.weight" for name in updated]
    untouched = [t["name"] for t in manifest["tensors"] if t["origin"] == "base"]
    assert untouched
    for name in untouched:
        (match,) = [key for key in base if name == key or name.endswith("." + key)]
        assert torch.equal(exported[name], base[match]), name
    AutoModelForSequenceClassification.from_pretrained(out).save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == exported.keys()
    assert all(torch.equal(again[name], exported[name]) for name in exported)


@pytest.mark.parametrize("family", ["deberta", "falcon"])
def test_a_family_that_changes_outputs_in_place_trains_without_zero3(tmp_path, family):
    """Under ZeRO-3 DeepSpeed's hooks replace the outputs of layers."""
    _write_base(family, tmp_path / "base")
    more = {"train.precision": "fp32", "train.num_steps": 2}  # transformers loads some of DeBERTa in fp32 alone
    _train_alone(_settings(tmp_path, **more))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 0
    assert main(["verify", str(tmp_path / "export"), "--against", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_and_the_padding_token_are_set_whatever_their_names(tmp_path, family):
    _write_base(family, tmp_path / "base")
    run = load_run("tests/data/world_size.toml", _settings(tmp_path, **{"model.dropout": 0.25}))
    tokenizer = load_tokenizer(run)
    config = load_model_config(run, ["a", "b"], tokenizer)
    set_dropout(config, dict.fromkeys(dropout_of(config), run.model.dropout))
    assert config.pad_token_id == tokenizer.pad_token_id == 0
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    probabilities = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    probabilities |= {getattr(m, "attention_dropout", 0.25) for m in model.modules()}
    assert {p for p in probabilities if isinstance(p, float)} <= {0.25}
    assert getattr(config, "layerdrop", 0.0) == 0.0


def test_what_the_base_lacks_and_nothing_trains_is_refused_by_name(tmp_path):
    _write_base("bert", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    lacks = "embeddings.LayerNorm"
    save_file({n: t for n, t in weights.items() if lacks not in n}, tmp_path / "base" / "model.safetensors")
    fix = r'pst\.modules_to_save = \["bert\.pooler", "classifier", "bert\.embeddings\.LayerNorm"\]'
    with pytest.raises(ConfigError, match=r"has no bert\.embeddings\.LayerNorm: .*" + fix):
        _train_alone(_settings(tmp_path))
    saved = ["bert.pooler", "classifier", "bert.embeddings.LayerNorm"]
    _train_alone(_settings(tmp_path, **{"pst.modules_to_save": saved}))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 0


def test_a_pooler_that_the_base_lacks_is_new_and_trains(tmp_path):
    _write_base("bert", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "pooler" not in n}, tmp_path / "base" / "model.safetensors")
    _train_alone(_settings(tmp_path))
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "export")]) == 0
    assert load_file(tmp_path / "export" / "model.safetensors")["bert.pooler.dense.weight"].any()


def test_experts_that_are_trained_are_written_as_the_files_hold_them(tmp_path):
    _write_base("mixtral", tmp_path / "base")
    _train_alone(_settings(tmp_path, method="dense", **{"train.precision": "fp32", "train.num_steps": 3}))
    out = tmp_path / "export"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--against", str(tmp_path / "run")]) == 0
    base, exported = load_file(tmp_path / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(exported) == {f"model.{name}" for name in base} | {"score.weight"}
    name = "layers.0.block_sparse_moe.experts.2.w3.weight"
    assert exported[f"model.{name}"].shape == base[name].shape
    assert not torch.equal(exported[f"model.{name}"], base[name])


@pytest.mark.thorough
@pytest.mark.zero3
def test_recomputing_activations_in_the_reentrant_way_trains_the_same(run_ranks, tmp_path):
    _write_base("llama", tmp_path / "base")
    trained = []
    for recomputed in ({}, {"model.gradient_checkpointing": True, "model.gradient_checkpointing_reentrant": True}):
        folder = tmp_path / f"run{len(trained)}"
        more = {"output_dir": str(folder), "train.precision": "fp32", "train.num_steps": 4, **recomputed}
        settings = _settings(tmp_path, **more)
        result, *_ = run_ranks(_train, 2, settings)
        trained.append((result["mask_checksum"], dict(read_checkpoint(folder / "checkpoints" / "final").trained)))
    (checksum, plain), (own_checksum, own) = trained
    assert own_checksum == checksum
    for name, tensor in plain.items():
        torch.testing.assert_close(own[name], tensor)


def test_gpt2_c_attn_is_three_matrices(tmp_path):
    _write_base("gpt2", tmp_path / "base")
    _train_alone(_settings(tmp_path))
    trained = dict(read_checkpoint(tmp_path / "run" / "checkpoints" / "final").trained)
    assert trained["transformer.h.0.attn.c_attn.pst_V"].shape == (3 * 8, 24)
    assert trained["transformer.h.0.attn.c_attn.pst_U"].shape == (3 * 24, 8)
    assert set(Path(tmp_path / "run" / "checkpoints").iterdir()) >= {tmp_path / "run" / "checkpoints" / "final"}


@pytest.mark.zero3
@pytest.mark.parametrize("method", ["dense", "magnitude"])
@pytest.mark.thorough
def test_baselines_train_every_weight_and_export(run_ranks, tmp_path, method, capsys):
    _write_base("bert", tmp_path / "base")
    settings = _settings(tmp_path, method=method, **{"train.precision": "fp32"})
    result, _ = run_ranks(_train, 2, settings)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert result["trained_parameters"] > sum(t.numel() for t in base.values())
    out = tmp_path / "export"
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--against", str(tmp_path / "run")]) == 0
    weight = load_file(out / "model.safetensors")["bert.encoder.layer.0.output.dense.weight"]
    start = base["encoder.layer.0.output.dense.weight"]
    assert not torch.equal(weight[weight != 0], start[weight != 0])
    zeros = int((weight == 0).sum())
    assert zeros == (math.floor(SPARSITY * weight.numel()) if method == "magnitude" else 0)
    if method == "magnitude":  # those of the smallest |W0|
        assert float(start[weight == 0].abs().max()) <= float(start[weight != 0].abs().min())
