"""Channels are removed from every family that can express it, and from no other."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from pst_ds.cli.main import main
from pst_ds.config.one_shot import PruneConfig
from pst_ds.errors import InputError
from pst_ds.nn.model_structure import is_experts, stack_names
from pst_ds.parallel.ranks import all_ranks
from pst_ds.prune.blocks import Calibration
from pst_ds.prune.channels import cut_channels
from pst_ds.prune.model_files import ModelFiles
from tests.nn.expert_families import tiny_model

from .conftest import stopped_after

_TEXT = {
    "vocab_size": 48, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 32, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
_MHA = {**_TEXT, "num_key_value_heads": 6}
_ENCODER = {name: value for name, value in _TEXT.items() if name != "num_key_value_heads"}
_BLOOM = {"vocab_size": 48, "hidden_size": 24, "n_layer": 3, "n_head": 6}
_GPT2 = {"vocab_size": 48, "n_embd": 24, "n_layer": 3, "n_head": 6, "n_positions": 32, "initializer_range": 0.3}
FAMILIES = {
    "bloom": ("BloomForCausalLM", _BLOOM), "opt": ("OPTForCausalLM", {**_ENCODER, "ffn_dim": 20}),
    "bert": ("BertModel", _ENCODER), "roberta": ("RobertaModel", _ENCODER), "gpt2": ("GPT2LMHeadModel", _GPT2),
    "distilbert": ("DistilBertModel", {"vocab_size": 48, "dim": 24, "n_layers": 3, "n_heads": 6, "hidden_dim": 20}),
    "mpnet": ("MPNetModel", _ENCODER), "electra": ("ElectraModel", {**_ENCODER, "embedding_size": 16}),
    "deberta_v2": ("DebertaV2Model", _ENCODER), "modernbert": ("ModernBertModel", _ENCODER),
    "gpt_neox": ("GPTNeoXForCausalLM", _ENCODER), "llama": ("LlamaForCausalLM", _TEXT),
    "mistral": ("MistralForCausalLM", _TEXT), "qwen2": ("Qwen2ForCausalLM", _TEXT),
    "qwen3": ("Qwen3ForCausalLM", {**_TEXT, "head_dim": 4}), "gemma2": ("Gemma2ForCausalLM", {**_TEXT, "head_dim": 4}),
    "phi3": ("Phi3ForCausalLM", _TEXT), "phi": ("PhiForCausalLM", _MHA), "olmo2": ("Olmo2ForCausalLM", _TEXT),
    "smollm3": ("SmolLM3ForCausalLM", _TEXT), "granite": ("GraniteForCausalLM", _TEXT),
}  # fmt: skip
OF_EXPERTS = ("qwen2_moe", "deepseek_v3", "gpt_oss", "lfm2_moe")
FIXED_WIDTH = {"bloom"}
IDS = torch.randint(2, 48, (10, 9), generator=torch.Generator().manual_seed(1))
BATCHES = [{"input_ids": ids} for ids in IDS.split(4)]


def _model(family):
    torch.manual_seed(1)
    if family in OF_EXPERTS:
        config = tiny_model(family).config
        config.intermediate_size, config.initializer_range = 16, 0.3
        return transformers.AutoModelForCausalLM.from_config(config).eval()
    class_name, config = FAMILIES[family]
    kind = getattr(transformers, class_name)
    return kind(kind.config_class(**config)).eval()


def _data():
    return Calibration(BATCHES, torch.device("cpu"), torch.float32, all_ranks())


def _cut(base, out, **asked):
    """Cut a folder; return the outcomes."""
    files = ModelFiles(str(base), out, 1 << 30)
    with files.working({}):
        found = cut_channels(files, PruneConfig(method="channels", **asked), (), _data())
        files.publish(lambda folder: None, {})
    return found


@torch.no_grad()
def _logits(model):
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return torch.cat([model(**batch)[0] for batch in BATCHES])


def _silence(model):
    """Give every output matrix of feed-forward layers zeros for half of its inputs."""
    generator = torch.Generator().manual_seed(2)
    for module in list(model.modules()):
        if is_experts(module):
            stack = getattr(module, stack_names(module)[1]).data
            for expert in stack:
                inputs = expert if module.is_transposed else expert.t()
                inputs[torch.randperm(len(inputs), generator=generator)[len(inputs) // 2 :]] = 0.0
    for name, module in model.named_modules():
        ends = ("down_proj", "output.dense", "mlp.c_proj", "lin2", "fc2", "dense_4h_to_h", "mlp.Wo", "w2")
        if name.endswith(ends) and "attention.output" not in name and hasattr(module, "weight"):
            inputs = module.weight.data if type(module).__name__ == "Conv1D" else module.weight.data.t()
            inputs[torch.randperm(len(inputs), generator=generator)[len(inputs) // 2 :]] = 0.0


@pytest.mark.parametrize("family", [*FAMILIES, *OF_EXPERTS])
def test_removing_silent_channels_changes_nothing(tmp_path, family):
    model = _model(family)
    _silence(model)
    model.save_pretrained(tmp_path / "base")
    if family in FIXED_WIDTH:
        with pytest.raises(InputError, match=f"no setting of the config of {family} is the width"):
            _cut(tmp_path / "base", tmp_path / "out", ffn=0.5)
        return
    found, settings = _cut(tmp_path / "base", tmp_path / "out", ffn=0.5)
    assert all(2 * one.kept == one.channels and one.error < 1e-9 for one in found)
    assert settings
    smaller = type(model).from_pretrained(tmp_path / "out").eval()
    assert smaller.num_parameters() < model.num_parameters()
    torch.testing.assert_close(_logits(smaller), _logits(model), rtol=1e-3, atol=1e-4)


def _shared(base, out, blocks=0):
    """Cut a folder; stop after so many blocks as if a disk were full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pst_ds.prune.blocks.PIECE_TOKENS", 18)
        return stopped_after(blocks, lambda: _cut(base, out, ffn=0.5))


@pytest.mark.zero3
@pytest.mark.parametrize("family", ["bert", "llama", "qwen2_moe", "gpt_oss"])
def test_killed_after_every_block_and_on_other_ranks_the_bits_are_the_same(run_ranks, tmp_path, family):
    _model(family).save_pretrained(tmp_path / "base")
    assert _shared(tmp_path / "base", tmp_path / "alone") == ""
    for ranks in (1, 2, 3):
        out = tmp_path / str(ranks)
        for blocks in (1, 2):
            assert set(run_ranks(_shared, ranks, tmp_path / "base", out, blocks)) == {"no space left on device"}
        assert set(run_ranks(_shared, ranks, tmp_path / "base", out)) == {""}
        for file in sorted((tmp_path / "alone").iterdir()):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(("options", "message"), [
    ([], "--method channels needs the share of channels that stay"),
    (["--ffn", "0.33"], "--ffn 0.33 leaves 6.6 of 20 channels (intermediate_size); widths are multiples of 1"),
    (["--ffn", "0.5", "--sparsity", "0.5"], "--sparsity 0.5 is for weights"),
    (["--ffn", "0.5", "--pattern", "2:4"], "--pattern 2:4 is for weights, and --method channels removes channels"),
    (["--speedup", "1.1"], "--speedup and --target need each other"),
    (["--speedup", "1.1", "--target", "gpu", "--ffn", "0.5"], "--speedup 1.1 chooses --ffn itself. Remove --ffn"),
    (["--speedup", "9", "--target", "gpu"], "fewer feed-forward channels make"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused_with_one_message(tmp_path, capsys, options, message):
    _model("llama").save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained(tmp_path / "base")
    words = [
        "--set",
        f"model.path={json.dumps(str(tmp_path / 'base'))}",
        "--out",
        str(tmp_path / "out"),
        "--samples",
        "4",
    ]
    assert main(["prune", "tests/data/causal_lm.toml", "--method", "channels", *words, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
