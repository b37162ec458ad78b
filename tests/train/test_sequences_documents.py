"""Documents packed into one sequence do not see each other, and a model that cannot keep them apart is refused."""

from __future__ import annotations

from functools import partial
from inspect import Parameter, signature

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pst_ds.cli.main import main
from pst_ds.core.documents import by_document
from pst_ds.data.tasks.causal_lm import Sequences, collate_sequences
from pst_ds.parallel.engine import LocalEngine
from pst_ds.parallel.sequence import SequenceParallel
from pst_ds.train.sequences import flatten_packed_rows, keep_documents_apart, reads_on
from tests.nn.expert_families import tiny_model
from tests.pairs import every_pair

_SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": _SMALL, "qwen2": _SMALL, "qwen3": _SMALL, "phi3": _SMALL, "gemma2": {**_SMALL, "sliding_window": 5},
    "gemma3_text": {**_SMALL, "sliding_window": 5}, "granite": _SMALL, "olmo2": _SMALL, "gpt2": _GPT2,
    "gpt_neox": {key: value for key, value in _SMALL.items() if key not in ("num_key_value_heads", "head_dim")},
    # these make their masks without positions
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "gpt_oss": {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    # this one passes the mask to its attention by keyword
    "afmoe": {
        **_SMALL, "sliding_window": 5, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip


def _model(family):
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.use_cache = False
    return _drawn_wide(model)


@torch.no_grad()
def _drawn_wide(model):
    for param in model.parameters():
        if param.dim() > 1:
            param.normal_(std=0.3)  # small ones as drawn by transformers would hide a leak
    return model


def _packed(*lengths):
    """One sequence of documents of these lengths, and the documents."""
    tokens = np.random.default_rng(5).integers(3, 64, sum(lengths)).astype(np.int32)
    starts = np.cumsum([0, *lengths[:-1]])
    sequences = Sequences(tokens, len(tokens), borders=starts)
    return collate_sequences(sequences, [0]), [
        torch.from_numpy(part.astype(np.int64)) for part in np.split(tokens, starts[1:])
    ]


@every_pair
@pytest.mark.parametrize("is_long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_packed_document_has_the_logits_that_it_has_alone(family, is_long, monkeypatch):
    monkeypatch.setattr("pst_ds.core.documents.LONG", 20 if is_long else 30)
    model, (batch, documents) = _model(family), _packed(7, 12, 1, 9)
    keep_documents_apart(model)
    alone = torch.cat([model(input_ids=document[None]).logits[0] for document in documents])
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
    assert (packed - alone).abs().max() <= 1e-5 * alone.abs().max()
    leaking = model(input_ids=batch["input_ids"]).logits[0]
    assert (leaking - alone).abs().max() > 1e-2 * alone.abs().max()  # so that the comparison could have failed


class _LargestTensor(TorchDispatchMode):
    """Notes the most elements of a tensor that an operator returns."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.most = max([self.most, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_long_sequences_of_documents_have_the_gradients_of_a_mask_and_no_tensor_of_all_pairs(monkeypatch):
    length, gradients, most = 320, {}, {}
    tokens = np.random.default_rng(8).integers(3, 64, 2 * length).astype(np.int32)
    sequences = Sequences(tokens, length, borders=np.array([0, 5, 130, 200, length, length + 200]))
    batch = collate_sequences(sequences, [1, 0])
    for limit in (length, length + 1):
        monkeypatch.setattr("pst_ds.core.documents.LONG", limit)
        model = _model("llama").train()
        keep_documents_apart(model)
        model.gradient_checkpointing_enable()
        with _LargestTensor() as seen:
            model(**batch).loss.backward()
        gradients[limit] = [param.grad for param in model.parameters()]
        most[limit] = seen.most
    for by_table, by_mask in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(by_table, by_mask, rtol=1e-4, atol=1e-5)
    assert most[length] < length**2 <= most[length + 1]


def _registries():
    """What transformers finds in its registries of attention and of masks, by id."""
    registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    return [{key: id(function) for key, function in registry.items()} for registry in registries]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_registries_are_changed_only_while_the_model_computes(implementation, monkeypatch):
    """Also after an error, and in a backward pass, which recomputes blocks."""
    monkeypatch.setattr("pst_ds.core.documents.LONG", 20)
    model, (batch, _) = _model("llama").train(), _packed(7, 12, 1, 9)
    model.set_attn_implementation(implementation)
    before, inside = _registries(), []
    keep_documents_apart(model)
    model.gradient_checkpointing_enable()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _module, _args: inside.append(_registries()))
    loss = model(**batch).loss
    assert _registries() == before
    loss.backward()
    assert _registries() == before
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + 1000, position_ids=batch["position_ids"])
    assert _registries() == before
    assert len(inside) == 4
    assert before not in inside


@pytest.mark.parametrize("wrap", [by_document, partial(SequenceParallel._sharing_attention, None)])
def test_wrapped_attention_has_the_parameters_of_what_it_wraps(wrap):
    """Names, kinds and order, because some models pass an argument by position and some by keyword."""
    expected = list(signature(sdpa_attention_forward).parameters.values())
    got = list(signature(wrap(sdpa_attention_forward), follow_wrapped=False).parameters.values())
    *named, others_by_position, others_by_name = [(parameter.name, parameter.kind) for parameter in got]
    assert named == [(parameter.name, parameter.kind) for parameter in expected[: len(named)]]
    assert "attention_mask" in dict(named)
    assert others_by_position[1] == Parameter.VAR_POSITIONAL
    assert others_by_name[1] == Parameter.VAR_KEYWORD


@pytest.mark.parametrize("table", [None, torch.tensor([[0, 0, 2], [0, 2, 5]])], ids=["no mask", "table"])
def test_arguments_of_attention_are_passed_by_position_or_by_keyword(table):
    q, k, v = torch.randn(3, 1, 4, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()
    attend, module = by_document(sdpa_attention_forward), torch.nn.Module()
    bias = torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(2))
    arguments = {
        "module": module, "query": q, "key": k, "value": v, "attention_mask": table, "dropout": 0.0, "scaling": 0.3,
        "is_causal": True, "position_bias": bias,
    }  # fmt: skip
    spans = [(0, 5)] if table is None else [(0, 2), (2, 5)]
    expected = torch.zeros(1, 5, 4, 8)
    for start, stop in spans:
        scores = 0.3 * q[..., start:stop, :] @ k[..., start:stop, :].mT + bias[..., start:stop, start:stop]
        unseen = torch.ones(stop - start, stop - start).triu(1).bool()
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        expected[:, start:stop] = (weights @ v[..., start:stop, :]).transpose(1, 2)
    for by_position in range(len(arguments) + 1):
        positional = list(arguments.values())[:by_position]
        by_name = dict(list(arguments.items())[by_position:])
        torch.testing.assert_close(attend(*positional, **by_name)[0], expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_made_one_give_the_same_loss_and_gradients(family):
    one, other = _model(family), _model(family)
    flatten_packed_rows(other)
    seen = []
    other.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    tokens = np.random.default_rng(8).integers(3, 64, 36).astype(np.int32)
    sequences = Sequences(tokens, 12, borders=np.array([0, 5, 13, 20, 24, 31]))
    batch = collate_sequences(sequences, [2, 0, 1])
    results = [model(**batch, output_hidden_states=True) for model in (one, other)]
    assert seen == [(1, 36)]
    torch.testing.assert_close(results[1].logits, results[0].logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1].loss, results[0].loss)
    assert [h.shape for h in results[1].hidden_states] == [h.shape for h in results[0].hidden_states]
    for result in results:
        result.loss.backward()
    for (name, param), (_, flat) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(flat.grad, param.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_masks_are_made_for_documents_in_their_own_model_alone(implementation):
    model, other, (batch, _) = _model("opt"), _model("opt"), _packed(7, 9)
    for one in (model, other):
        one.set_attn_implementation(implementation)
    expected = other(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    keep_documents_apart(model)
    keep_documents_apart(model)  # twice is once
    found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert (found[:, 7:] - expected[:, 7:]).abs().max() > 1e-2
    torch.testing.assert_close(found[:, :7], expected[:, :7])
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + 1000, position_ids=batch["position_ids"])
    assert torch.equal(other(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits, expected)


def _experts(seed, layers=24):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen3_moe", **_SMALL, moe_intermediate_size=16, num_experts=16, num_experts_per_tok=4, use_cache=False
    )
    config.num_hidden_layers = layers
    return _drawn_wide(AutoModelForCausalLM.from_config(config))


def _engine(model):
    return LocalEngine(model, [{"params": list(model.parameters())[:1]}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_leak_is_told_from_the_roundings_of_many_experts(dtype, monkeypatch):
    ids = torch.arange(3, 19)
    for seed in range(4):
        assert not reads_on(_engine(_experts(seed).to(dtype)), ids)
    for name in ("positions", "mask"):  # an attention that forgets either
        model = _experts(0, layers=2).to(dtype)
        if name == "positions":
            forward = model.forward
            model.forward = lambda forward=forward, **inputs: forward(input_ids=inputs["input_ids"])
        else:
            functions = ALL_MASK_ATTENTION_FUNCTIONS
            monkeypatch.setitem(functions, "sdpa", lambda mask_function, q_length, **_: torch.ones(q_length, q_length))
        assert reads_on(_engine(model), ids)


def _train(folder, model, capsys, **more):
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained(folder / "base")
    settings = {
        "output_dir": folder / "run", "model.path": folder / "base", "deepspeed_config": "", "train.num_steps": 1,
        "data.max_length": 16, **more,
    }  # fmt: skip
    code = main(["train", "tests/data/causal_lm.toml", *(f"--set={k}={v}" for k, v in settings.items())])
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("afmoe", {"model.gradient_checkpointing": "true"}),
        ("opt", {}),
        ("opt", {"data.document_mask": "true"}),
        ("gpt_oss", {}),
        ("qwen3_moe", {"data.document_mask": "true", "pst.exclude_modules": '["experts"]'}),
    ],
    ids=str,
)
def test_a_model_whose_masks_can_keep_documents_apart_trains(family, more, tmp_path, capsys):
    model = _experts(0, layers=12) if family == "qwen3_moe" else _model(family)
    before = _registries()
    code, said = _train(tmp_path, model, capsys, **more)
    assert code == 0, said
    assert "lets tokens see" not in said
    assert _registries() == before


@pytest.mark.few(1)
@pytest.mark.parametrize("mask", ["", "true", "false"])
def test_a_model_that_reads_on_trains_with_a_warning_unless_it_was_asked_not_to(mask, tmp_path, capsys):
    """Its linear attention heeds neither positions nor masks."""
    before = _registries()
    code, said = _train(tmp_path, tiny_model("qwen3_next"), capsys, **({"data.document_mask": mask} if mask else {}))
    assert _registries() == before  # also where the run is refused
    assert code == (2 if mask == "true" else 0), said
    expected = {
        "": "data.document_mask is not set, and model.path",
        "true": "data.document_mask = true, but model.path",
        "false": "",
    }[mask]
    assert said.count("(qwen3_next) lets tokens see the documents before their own") == bool(expected)
    assert expected in said
