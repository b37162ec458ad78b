"""Families of decoders in the native loop, against transformers' own forward pass: tiny, random and dense."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from pst_ds.errors import InputError
from pst_ds.inference.decoder import Decoder, DecoderError
from pst_ds.inference.decoder.decoder import PROBE_TOKENS
from pst_ds.inference.decoder.model_reader import table_of

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Llama": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    "Mistral": {"sliding_window": 7, "head_dim": 16},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Ministral3": {"head_dim": 16, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "max_position_embeddings": 256, "llama_4_scaling_beta": 0.5,
    }},
    "SmolLM3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    "Phi3": {"sliding_window": 9, "partial_rotary_factor": 0.5},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0},
    "Gemma3Text": {
        "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "Granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0, "attention_multiplier": 0.2,
    },
    "Olmo2": {},
    "Olmo3": {"sliding_window": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "Olmo": {},
    "Apertus": {},
    "HyperCLOVAX": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0, "attention_multiplier": 0.2,
        "use_post_norm": True,
    },
    "Jais2": {},
    "Arcee": {},
    "Cwm": {"sliding_window": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "Ernie4_5": {"head_dim": 16},
    "Exaone4": {"sliding_window": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "Glm": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "Glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "Helium": {"head_dim": 12},
    "Nemotron": {"partial_rotary_factor": 0.5},
    "SeedOss": {"head_dim": 16},
    "StableLm": {"partial_rotary_factor": 0.5},
    "Starcoder2": {"sliding_window": 6},
    "VaultGemma": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
}  # fmt: skip


def _model(family, **more):
    """Every parameter is random, gains and biases too: what a table forgets shows in the logits."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **more})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            around = 1.0 if param.dim() == 1 and "bias" not in name and "Gemma" not in family else 0.0
            param.copy_(torch.randn_like(param) * (0.15 if param.dim() > 1 else 0.1) + around)
    return model


def _expected(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


def _least_cosine(got, expected):
    return torch.cosine_similarity(got.double(), expected.double(), dim=-1).min().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    model = _model(family)
    ids = torch.randint(0, 97, (40,))
    expected = _expected(model, ids)
    for cache, least in (("fp32", 1 - 1e-6), ("bf16", 0.9995), ("int8", 0.995)):
        decoder = Decoder.from_model(model, 64, threads=1, cache=cache)
        parts = [decoder.forward(ids[:20], all_logits=True)]
        parts += [decoder.forward(ids[i : i + 1], all_logits=True) for i in range(20, 40)]
        assert _least_cosine(torch.cat(parts), expected) > least
        assert torch.cat(parts).norm() == pytest.approx(float(expected.norm()), rel=0.02)  # which no cosine sees
        decoder.reset()
        decoder.threads = 2
        assert torch.equal(decoder.forward(ids, all_logits=True), torch.cat(parts))


def test_an_mlp_without_a_gate_and_biases_everywhere():
    model = _model("Llama", attention_bias=True, mlp_bias=True, hidden_act="gelu")
    ids = torch.randint(0, 97, (20,))
    decoder = Decoder.from_model(model, 64, cache="fp32")
    assert _least_cosine(decoder.forward(ids, all_logits=True), _expected(model, ids)) > 1 - 1e-6


def test_a_model_that_computes_something_else_is_refused_by_its_logits():
    model = _model("Llama")
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _module, _args, output: output * 1.5)
    with pytest.raises(DecoderError, match="logits differ"):
        Decoder.from_model(model, 64)


def _rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 500.0, **more}


_LONG = {"short_factor": [1.0] * 3, "long_factor": [4.0] * 3}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "default": _rope("default", partial_rotary_factor=0.5),
    "linear": _rope("linear", factor=2.0),
    "dynamic": _rope("dynamic", factor=2.0),
    "yarn": _rope("yarn", **_YARN, beta_fast=8.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.5, truncate=False),
    "llama3": _rope("llama3", **_YARN, low_freq_factor=1.0, high_freq_factor=4.0),
}


@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_rotary_angles_up_to_the_last_position(kind):
    model = _model("Llama", rope_parameters=ROPES[kind])
    ids = torch.randint(0, 97, (64,))
    decoder = Decoder.from_model(model, 64, cache="fp32")
    assert _least_cosine(decoder.forward(ids, all_logits=True), _expected(model, ids)) > 1 - 1e-6


@pytest.mark.parametrize("by_layer_type", [False, True])
def test_unknown_rotary_parameters_are_refused_by_name(by_layer_type):
    """One that says what happens to more than the angles cannot be told from one that does not."""
    unknown = _rope("default", foo_scaling_beta=0.1)
    rope = {"sliding_attention": _rope("default"), "full_attention": unknown} if by_layer_type else unknown
    model = _model("Gemma3Text" if by_layer_type else "Llama", rope_parameters=rope)
    with pytest.raises(DecoderError, match=r"foo_scaling_beta = 0\.1 in rope_parameters"):
        table_of(model, 8)
    model.config.rope_parameters = _rope("spiral")
    with pytest.raises(DecoderError, match="rope_type = 'spiral'"):
        table_of(model, 8)


@pytest.mark.parametrize(("family", "rope", "cause"), [
    ("Ministral3", _rope("yarn", **_YARN, llama_4_scaling_beta=0.5), r"queries .* 32 positions \(llama_4"),
    ("Phi3", _rope("longrope", **_LONG), "longrope .* 32 positions"),
])  # fmt: skip
def test_what_changes_beyond_the_original_positions_is_right_up_to_them(family, rope, cause):
    model = _model(family, rope_parameters=rope, original_max_position_embeddings=32)
    ids = torch.randint(0, 97, (32,))
    decoder = Decoder.from_model(model, 32, cache="fp32")
    assert _least_cosine(decoder.forward(ids, all_logits=True), _expected(model, ids)) > 1 - 1e-6
    with pytest.raises(DecoderError, match=f"context = 33: .*{cause}"):
        Decoder.from_model(model, 33, verify=False)


def test_positions_near_the_end_of_the_context_are_checked():
    """A part of a model that begins to matter only there, at the price of as few tokens as at the start."""
    model = _model("Llama", max_position_embeddings=1 << 17)
    tokens = []
    model.model.embed_tokens.register_forward_hook(lambda _module, args, _output: tokens.append(args[0].numel()))
    assert Decoder.from_model(model, 1 << 17).context == 1 << 17
    assert sum(tokens) <= 2 * PROBE_TOKENS

    def late(_module, _args, kwargs, output):
        return output * torch.where(kwargs["position_ids"] < 900, 1.0, 1.5)[..., None]

    for layer in model.model.layers:
        layer.register_forward_hook(late, with_kwargs=True)
    Decoder.from_model(model, 900)
    with pytest.raises(DecoderError, match=r"logits differ .* at positions 1000 to 1023"):
        Decoder.from_model(model, 1024)


_NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}


def _not_a_list(model):
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    return model


def _of_config(config):
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


REFUSED = {
    "layers under another name": (
        lambda: _of_config(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2)), "GPT2Model has no list 'layers'",
    ),
    "a norm under another name": (lambda: _of_config(transformers.GPTNeoXConfig(**_NEOX)), "NeoXModel has no 'norm'"),
    "layers that are no list": (lambda: _not_a_list(_model("Llama")), "LlamaModel has no list 'layers'"),
    "experts": (
        lambda: _of_config(transformers.Qwen3MoeConfig(**SIZES, num_experts=2, moe_intermediate_size=8)),
        r"Qwen3MoeSparseMoeBlock has no gate_up_proj .*; .*has mlp\.experts, mlp\.gate",
    ),
    "attention and MLP in parallel": (
        lambda: _of_config(transformers.CohereConfig(**SIZES)), "CohereDecoderLayer has no norm .* in parallel",
    ),
    "an activation": (lambda: _model("Llama", hidden_act="quick_gelu"), "activation 'quick_gelu'"),
    "queries that are limited": (lambda: _model("Olmo", clip_qkv=2.0), r"clip_qkv = 2\.0"),
    "several parts, all named": (
        lambda: _of_config(transformers.PhiConfig(**SIZES, hidden_act="quick_gelu")),
        "^model_type = 'phi': .* PhiModel has no 'norm' after its layers; activation 'quick_gelu' .*; PhiMLP has no "
        r"gate_up_proj .*; PhiDecoderLayer has .*mlp\.fc1, mlp\.fc2.* in parallel\. Use transformers' own generate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_table_is_refused(case):
    make, said = REFUSED[case]
    with pytest.raises(DecoderError, match=said):
        table_of(make(), 16)


class _MeanNorm(torch.nn.LayerNorm):
    """Divides by the mean magnitude."""

    def forward(self, x):
        return self.weight * x / x.abs().mean(-1, keepdim=True)


def test_a_norm_that_is_neither_of_the_two_kinds_is_refused():
    model = _model("Llama")
    model.model.norm = _MeanNorm(48)
    with pytest.raises(DecoderError, match="_MeanNorm is neither a root-mean-square norm nor a layer norm"):
        table_of(model, 16)


@pytest.mark.parametrize(
    ("family", "more", "changed", "said"),
    [
        ("Mistral", {"sliding_window": -5}, {}, "sliding_window = -5"),
        ("Phi3", {"partial_rotary_factor": 2.0}, {}, "rotary angles turn 24 columns of a head of 12"),
        ("Llama", {}, {"num_attention_heads": 400}, r"qkv: weights of \(96, 48\) where the config has \(4848, 48\)"),
        ("Llama", {}, {"num_key_value_heads": 3}, "key_value_heads = 3 does not divide heads = 4"),
        ("Llama", {}, {"hidden_size": 1 << 31}, r"LlamaRMSNorm has weights of another shape than \(2147483648,\)"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(family, more, changed, said):
    """Before C++ reads or writes by it."""
    model = _model(family, **more)
    for key, value in changed.items():
        setattr(model.config, key, value)
    with pytest.raises(InputError, match=said):
        Decoder.from_model(model, verify=False)


def test_a_window_of_any_size_is_one_of_the_context():
    model, ids = _model("Mistral", sliding_window=10**20), torch.arange(1, 30)
    got = Decoder.from_model(model, verify=False).forward(ids, all_logits=True)
    assert _least_cosine(got, _expected(model, ids)) > 0.999
