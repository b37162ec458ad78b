"""Buffers of the base model, with values that show when they are lost, from the pretrained folder to the export."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pst_ds import CubicSchedule, MaskUpdater, PSTConfig, inject_pst, load_pretrained, merge_and_unload, save_pretrained
from pst_ds.atomic_files import file_sha256
from pst_ds.cli.main import main
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.formats.safetensors_file import tensor_bytes
from pst_ds.nn.inject import persistent_buffers
from pst_ds.nn.optimizer import pst_optimizer
from pst_ds.parallel.launch import launch_environment
from pst_ds.train import model as run_model
from pst_ds.train.run import prepare, train_prepared
from pst_ds.writing import check
from pst_ds.writing.manifest import sealed

LLAMA = "tests/data/tiny-llama"
_TEXT = {
    "vocab_size": 40, "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 36,
    "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
FAMILIES = {
    "DeepseekV3ForCausalLM": {
        **_TEXT, **_MOE, "num_hidden_layers": 2, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12,
    },
    "Glm4MoeForCausalLM": {**_TEXT, **_MOE, "num_hidden_layers": 2, "first_k_dense_replace": 1, "head_dim": 12},
    "NemotronHForCausalLM": {
        **_TEXT, **_MOE, "layers_block_type": ["mamba", "moe", "attention", "moe"], "head_dim": 12,
        "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 2, "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "Gemma4ForCausalLM": {
        **_TEXT, "num_hidden_layers": 2, "head_dim": 12, "global_head_dim": 12, "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 40, "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


class BertWithBatchNorm(transformers.BertForSequenceClassification):
    """Its classifier reads normalised hidden states."""

    def __init__(self, config):
        super().__init__(config)
        self.bert.norm = torch.nn.BatchNorm1d(config.hidden_size)
        self.bert.register_forward_hook(self._normalise)
        self.post_init()

    @staticmethod
    def _normalise(bert, _inputs, output):
        output.pooler_output = bert.norm(output.pooler_output)
        return output


@pytest.fixture(autouse=True)
def _alone(alone):
    pass


@torch.no_grad()
def _randomise(model):
    """Values as no model starts with."""
    generator = torch.Generator().manual_seed(3)
    for buffer in persistent_buffers(model).values():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
        else:
            buffer.fill_(7)
    return model


def _base(name, folder):
    torch.manual_seed(1)
    kind = getattr(transformers, name)
    model = _randomise(kind(kind.config_class(**FAMILIES[name])))
    assert persistent_buffers(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder)


def _train(folder, run_file="tests/data/causal_lm.toml", **more):
    settings = {
        "output_dir": str(folder / "run"), "model.path": str(folder / "base"), "deepspeed_config": "",
        "schedule.final_sparsity": 0.7, "schedule.update_interval": 1, "train.num_steps": 4, **more,
    }  # fmt: skip
    run = load_run(run_file, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    return train_prepared(prepare(run, launch_environment()), quiet=True)


def _take_out(folder, name):
    """Take a tensor out of the file, and out of the manifest and its SHA-256, as if it had never been exported."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    (entry,) = [entry for entry in manifest["tensors"] if entry["name"] == name]
    manifest["tensors"].remove(entry)
    path = folder / entry["parts"][0]["file"]
    save_file({n: t for n, t in load_file(path).items() if n != name}, path, metadata={"format": "pt"})
    manifest["files"][path.name] = file_sha256(path)
    (folder / MANIFEST_FILE).write_text(json.dumps(sealed(manifest)))


def _require_whole(folder, kind, verb, capsys):
    """The export of a run has every buffer, its bits are the base's, and a missing one is found."""
    base = load_file(folder / "base/model.safetensors")
    out = folder / kind.replace(":", "")
    written = verb("export", str(folder / "run"), "--format", kind, "--out", str(out))
    verified = verb("verify", str(out), "--against", str(folder / "run"))
    assert (verified["differing_weights"], verified["differing_predictions"]) == (0, 0)
    assert verified["max_logit_difference"] == 0.0
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    buffers = [name for name in base if name.rpartition(".")[2] in BUFFERS]
    assert buffers
    for name in buffers:
        assert tensor_bytes(tensors[name]) == tensor_bytes(base[name]), name
    assert verified["compared_weights"] == written["pruned_tensors"] + len(buffers)
    _take_out(out, buffers[0])
    assert main(["verify", str(out)]) == 2
    assert buffers[0] in capsys.readouterr().err


BUFFERS = {"e_score_correction_bias", "layer_scalar", "running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.few(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_export_has_the_buffers_of_the_base(tmp_path, name, precision, verb, capsys):
    _base(name, tmp_path / "base")
    excluded = ["experts"] if "n_routed_experts" in FAMILIES[name] else []
    apart = name != "NemotronHForCausalLM"  # its recurrent layers read on from one document to the next
    _train(
        tmp_path, **{"pst.exclude_modules": excluded, "train.precision": precision, "data.document_mask": apart}
    )  # fmt: skip
    for kind in ("dense", "bitmask"):
        _require_whole(tmp_path, kind, verb, capsys)


def _meta(folder):
    with torch.device("meta"):
        return BertWithBatchNorm(transformers.BertConfig.from_pretrained(folder))


@pytest.fixture
def with_batch_norm(monkeypatch, tmp_path):
    """A classifier of that kind in the place of the base of a run."""
    auto = transformers.AutoModelForSequenceClassification
    monkeypatch.setattr(auto, "from_pretrained", BertWithBatchNorm.from_pretrained)
    monkeypatch.setattr(auto, "from_config", BertWithBatchNorm._from_config)
    monkeypatch.setattr(check, "model_of", _meta)
    model = _randomise(BertWithBatchNorm.from_pretrained("tests/data/tiny-bert"))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained("tests/data/tiny-bert").save_pretrained(tmp_path / "base")


def test_batch_norms_keep_the_statistics_of_the_base(tmp_path, with_batch_norm, verb, capsys):
    result = _train(tmp_path, "tests/data/world_size.toml", **{"eval.interval": 2})
    assert result["steps"] == 4
    for kind in ("dense", "bitmask"):
        _require_whole(tmp_path, kind, verb, capsys)


def test_a_model_that_changes_its_buffers_is_refused(tmp_path, with_batch_norm, monkeypatch):
    monkeypatch.setattr(run_model, "_keep_statistics", lambda module: None)
    with pytest.raises(ConfigError, match=r"changes bert\.norm\.num_batches_tracked, bert\.norm\.running_mean, bert"):
        _train(tmp_path, "tests/data/world_size.toml")


def test_a_base_without_its_buffers_is_refused_and_no_pretrained_weight_drawn_again(tmp_path, with_batch_norm):
    path = tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    save_file({n: t for n, t in tensors.items() if "running_mean" not in n}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks bert\.norm\.running_mean, which training does not change"):
        _train(tmp_path, "tests/data/world_size.toml")


def _patch_tst():
    torch.manual_seed(1)
    config = transformers.PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, num_hidden_layers=2, d_model=16,
        num_attention_heads=2, ffn_dim=24, num_targets=3, use_cls_token=True,
    )  # fmt: skip
    return _randomise(transformers.PatchTSTForClassification(config))


def test_what_an_own_loop_changes_of_buffers_is_saved_loaded_merged_and_converted(tmp_path, verb):
    _patch_tst().save_pretrained(tmp_path / "base")
    kind = transformers.PatchTSTForClassification
    model = inject_pst(kind.from_pretrained(tmp_path / "base"), PSTConfig())
    before = {name: buffer.clone() for name, buffer in persistent_buffers(model).items()}
    assert "num_batches_tracked" in {name.rpartition(".")[2] for name in before}
    schedule = CubicSchedule(num_steps=3, final_sparsity=0.5)
    optimizer, masks = pst_optimizer(model), MaskUpdater(model, schedule)
    model.train()
    for _ in range(3):
        model(torch.randn(4, 16, 2), target_values=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        masks.after_step(optimizer)
    assert not any(torch.equal(buffer, before[n]) for n, buffer in persistent_buffers(model).items() if "norm" in n)
    save_pretrained(model, tmp_path / "small")
    values = torch.randn(5, 16, 2)
    expected = model.eval()(values).prediction_logits
    loaded = load_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "small").eval()
    assert torch.equal(loaded(values).prediction_logits, expected)
    merge_and_unload(loaded).save_pretrained(tmp_path / "merged")
    verb("export", str(tmp_path / "merged"), "--format", "bitmask", "--out", str(tmp_path / "packed"))
    verb("export", str(tmp_path / "packed"), "--out", str(tmp_path / "dense"))
    for folder in ("packed", "dense"):
        verb("verify", str(tmp_path / folder))
        again = kind.from_pretrained(tmp_path / folder).eval()
        torch.testing.assert_close(again(values).prediction_logits, expected)
        for name, buffer in persistent_buffers(model).items():
            assert torch.equal(again.get_buffer(name), buffer), name


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "NemotronHForCausalLM"])
def test_pruned_and_converted_folders_keep_them(tmp_path, name, verb):
    _base(name, tmp_path / "base")
    settings = [f"model.path={json.dumps(str(tmp_path / 'base'))}", 'pst.exclude_modules=["experts"]']
    options = [option for setting in settings for option in ("--set", setting)]
    verb("prune", "tests/data/causal_lm.toml", "--method", "magnitude", "--out", str(tmp_path / "pruned"), *options)
    verb("export", str(tmp_path / "pruned"), "--format", "bitmask", "--out", str(tmp_path / "packed"))
    verb("export", str(tmp_path / "packed"), "--out", str(tmp_path / "dense"))
    base = load_file(tmp_path / "base/model.safetensors")
    pruned, dense = (load_file(tmp_path / folder / "model.safetensors") for folder in ("pruned", "dense"))
    assert base.keys() == pruned.keys() == dense.keys()
    for key, tensor in pruned.items():
        assert torch.equal(dense[key], tensor), key
        assert torch.equal(tensor, base[key]) or "proj" in key, key
    verb("verify", str(tmp_path / "packed"))
    verb("verify", str(tmp_path / "dense"))
