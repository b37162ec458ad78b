"""Whole models as ONNX files: the same outputs as the masked model, in nodes that are as few as they can be."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
import transformers as hf

from pst_ds.cli.main import main
from pst_ds.inference.onnx import export as onnx_export
from pst_ds.inference.onnx import folder as onnx_folder
from pst_ds.inference.onnx.operators import open_session
from pst_ds.runtime.native_loop import LEVELS, best_level
from pst_ds.writing.encoding import ExportError

onnx = pytest.importorskip("onnx", reason="needs ONNX Runtime: pip install 'pst-ds[onnx]'")
ir = pytest.importorskip("onnx_ir", reason="needs ONNX Runtime: pip install 'pst-ds[onnx]'")
pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: pip install 'pst-ds[onnx]'")
pytestmark = pytest.mark.usefixtures("_compiler")

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 160,
}
DECODER = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3)),
    "bert without a head": lambda: hf.BertModel(hf.BertConfig(**SIZES)),
    "roberta": lambda: hf.RobertaForTokenClassification(
        hf.RobertaConfig(**SIZES, num_labels=5, type_vocab_size=1)  # as all published ones
    ),
    "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**SIZES, embedding_size=24)),
    "distilbert": lambda: hf.DistilBertForQuestionAnswering(
        hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=160)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)),
    "qwen2": lambda: hf.Qwen2ForSequenceClassification(hf.Qwen2Config(**DECODER, num_labels=2, pad_token_id=0)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=160)),
    "smollm3": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**DECODER, **WINDOW, **TOKENS, no_rope_layer_interval=2)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=8)),
    "qwen2 with a window": lambda: hf.Qwen2ForSequenceClassification(
        hf.Qwen2Config(**DECODER, **WINDOW, max_window_layers=1, num_labels=2, pad_token_id=0)
    ),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(**SIZES, **TOKENS, cls_token_id=1, sep_token_id=2, local_attention=8)
    ),
}
OUTPUTS = {"distilbert": ["start_logits", "end_logits"], "bert without a head": ["last_hidden_state", "pooler_output"]}
NODES = {
    "bert": {"SparseLinear": 2 * 4, "SkipLayerNorm": 1 + 2 * 2, "Attention": 2},
    "bert without a head": {"SparseLinear": 2 * 4, "SkipLayerNorm": 1 + 2 * 2, "Attention": 2},
    "roberta": {"SparseLinear": 2 * 4, "SkipLayerNorm": 1 + 2 * 2, "Attention": 2},
    "electra": {"SparseLinear": 2 * 4, "Attention": 2},
    "distilbert": {"SparseLinear": 2 * 4, "SkipLayerNorm": 1 + 2 * 2, "Attention": 2},
    "llama": {"SparseLinear": 2 * 7, "Attention": 2},
    "qwen2": {"SparseLinear": 2 * 7, "Attention": 2},
    "gpt2": {"SparseLinear": 2 * 4, "SkipLayerNorm": 2 * 2 + 1, "Attention": 2},
    "smollm3": {"SparseLinear": 7 + 5, "Attention": 2},  # without rotary angles q, k and v are one product
    "mistral": {"SparseLinear": 2 * 7, "Attention": 2},
    "qwen2 with a window": {"SparseLinear": 2 * 7, "Attention": 2},
    "modernbert": {"SparseLinear": 2 * 4, "SkipLayerNorm": 1 + 2 * 2 + 1, "Attention": 2},
}


def save(family, path, share=0.7):
    """A model with zeros in the layers of its blocks."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 2 and any(part in name for part in (".layer.", ".layers.", ".h.")):
                param.mul_(5.0)[torch.rand(param.shape) < share] = 0.0
            elif param.dim() == 1:
                param.add_(torch.randn(param.shape) * 0.1)
    model.save_pretrained(path)
    return path


def feeds(session, vocabulary=160):
    draw = np.random.default_rng(1)
    for batch, tokens in ((1, 3), (4, 13)):
        feed = {value.name: np.ones((batch, tokens), np.int64) for value in session.get_inputs()}
        feed["input_ids"] = draw.integers(1, vocabulary, (batch, tokens))
        feed["attention_mask"][-1, tokens - 2 :] = 0
        if "token_type_ids" in feed:
            feed["token_type_ids"][:, : tokens // 2] = 0
        yield feed


def assert_same_outputs(file, model):
    session = open_session(file, threads=1)
    names = [value.name for value in session.get_outputs()]
    for feed in feeds(session):
        with torch.no_grad():
            wanted = model(**{name: torch.from_numpy(array) for name, array in feed.items()}, return_dict=True)
        for name, got in zip(names, session.run(names, feed), strict=True):
            real = np.broadcast_to(feed["attention_mask"][..., None], got.shape) if got.ndim == 3 else 1
            real = feed["attention_mask"] if got.ndim == 2 and got.shape == feed["input_ids"].shape else real
            np.testing.assert_allclose(got * real, wanted[name].numpy() * real, rtol=1e-4, atol=2e-5)
    return names


def operators(file):
    return Counter(node.op_type for node in onnx.load(file).graph.node)


@pytest.mark.few(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_same_outputs(family, tmp_path):
    source, out = save(family, tmp_path / "model"), tmp_path / "onnx"
    assert main(["export", str(source), "--format", "onnx", "--out", str(out)]) == 0
    cls = getattr(hf, json.loads((source / "config.json").read_text())["architectures"][0])
    names = assert_same_outputs(out / "model.onnx", cls.from_pretrained(source).eval())
    assert names == OUTPUTS.get(family, ["logits"])
    found = operators(out / "model.onnx")
    assert {name: found[name] for name in NODES[family]} == NODES[family]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save("bert", tmp_path_factory.mktemp("bert") / "model")


@pytest.mark.few(1)
@pytest.mark.parametrize("how", [["int8", "int8"], ["int4", "int4"]], ids="/".join)
def test_codes_stay_codes_in_the_file(bert, tmp_path, how):
    values, embeddings = how
    options = ["--values", values, "--embeddings", embeddings, "--group", "row"]
    packed, out = tmp_path / "packed", tmp_path / "onnx"
    assert main(["export", str(bert), "--format", "bitmask", *options, "--out", str(packed)]) == 0
    assert main(["export", str(bert), "--format", "onnx", *options, "--out", str(out)]) == 0
    model = hf.BertForSequenceClassification.from_pretrained(
        packed, dtype=torch.float32, quantization_config=packed_config("dense")
    ).eval()
    assert_same_outputs(out / "model.onnx", model)
    graph = onnx.load(out / "model.onnx").graph
    kinds = {"int8": onnx.TensorProto.INT8, "int4": onnx.TensorProto.UINT8}
    types = {made.name: made.data_type for made in graph.initializer}
    for node in graph.node:
        if node.op_type in ("SparseLinear", "Embedding"):
            assert types[node.input[1 if node.op_type == "Embedding" else 2]] == kinds[values]


def packed_config(load_as):
    from pst_ds.hf import PackedWeightsConfig

    return PackedWeightsConfig(load_as=load_as)


@pytest.mark.thorough
def test_a_plain_file_runs_without_our_operators(bert, tmp_path):
    import onnxruntime

    out = tmp_path / "onnx"
    assert main(["export", str(bert), "--format", "onnx", "--plain", "--out", str(out)]) == 0
    onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    assert_same_outputs(out / "model.onnx", hf.BertForSequenceClassification.from_pretrained(bert).eval())


@pytest.mark.thorough
def test_the_folder_says_what_it_is(bert, tmp_path, capsys):
    out = tmp_path / "onnx"
    assert main(["export", str(bert), "--format", "onnx", "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["kind"] == "onnx"
    assert facts["operators"] == "pst_ds"
    assert facts["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert facts["file_bytes"] == (out / "model.onnx").stat().st_size
    assert facts["max_relative_difference"] < 1e-5
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    (line,) = [p.value for p in onnx.load(out / "model.onnx").metadata_props if p.key == "pst_ds"]
    assert json.loads(line)["sparsity_measured"] == pytest.approx(0.7, abs=0.02)


@pytest.mark.thorough
@pytest.mark.parametrize("values", [[], ["--values", "int8"]])
def test_a_graph_that_computes_something_else_is_not_kept(bert, tmp_path, monkeypatch, capsys, values):
    """Norms and biases of the file that are too large by a part in two thousand, as if one was rounded to fp16."""

    def copy_and_damage(source, out):
        copy_small_files(source, out)
        model = onnx.load(out / "model.onnx")
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 1:
                values = onnx.numpy_helper.to_array(tensor) * np.float32(1 + 5e-4)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(model, out / "model.onnx")

    copy_small_files = onnx_folder.copy_small_files
    monkeypatch.setattr(onnx_folder, "copy_small_files", copy_and_damage)
    out = tmp_path / "onnx"
    assert main(["export", str(bert), "--format", "onnx", *values, "--out", str(out)]) == 2
    assert "does not compute the same as the model: logits differs by" in capsys.readouterr().err
    assert not out.exists()


REFUSED = {
    "MambaForCausalLM cannot be written as a graph: other code reads the weight of a packed layer": lambda: (
        hf.MambaForCausalLM(
            hf.MambaConfig(
                **TOKENS, vocab_size=160, hidden_size=32, num_hidden_layers=1, state_size=4, time_step_rank=16
            )
        )
    ),
    "Gemma2ForCausalLM cannot be written as a graph: attention with soft-capped scores or sinks": lambda: (
        hf.Gemma2ForCausalLM(hf.Gemma2Config(**DECODER, head_dim=8))
    ),
    "T5ForConditionalGeneration does not take a single sequence of tokens": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=160)
    ),
    "MixtralForCausalLM has experts, and a graph cannot route tokens to them. Choose another format": lambda: (
        hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=2))
    ),
    "BambaForCausalLM cannot be written as a graph: torch's exporter fixes the number of tokens. Choose": lambda: (
        hf.BambaForCausalLM(
            hf.BambaConfig(
                **DECODER | TOKENS | {"num_hidden_layers": 1}, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8
            )
        )
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_traced_is_said_in_one_line(message, tmp_path, capsys):
    torch.manual_seed(0)
    model = REFUSED[message]()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("_proj.weight", ".o.weight")):
                param[torch.rand(param.shape) < 0.7] = 0.0
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "onnx"
    assert main(["export", str(tmp_path / "model"), "--format", "onnx", "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_layers_that_share_keys_and_values_have_nodes_of_their_own():
    """As those of Gemma 3n: no two values of a graph may have one name."""
    heads = [
        ir.Value(name=name, shape=ir.Shape(["batch", 2, "tokens", 8]), type=ir.TensorType(ir.DataType.FLOAT))
        for name in ("first", "second", "keys", "values")
    ]
    sizes = {"heads": 2, "head_size": 8}
    nodes = [
        ir.node("Attention", [query, *heads[2:]], attributes=sizes, domain="pst_ds", name=query.name)
        for query in heads[:2]
    ]
    for node in nodes:
        node.outputs[0].name, node.outputs[0].shape = f"{node.name}_out", heads[0].shape
    read = [ir.node("Identity", [node.outputs[0]]) for node in nodes]
    graph = ir.Graph(heads, [node.outputs[0] for node in read], nodes=[*nodes, *read], opset_imports={"": 20})
    onnx_export.fuse(graph)
    names = [value.name for node in graph for value in node.outputs]
    assert len(names) == len(set(names))
    assert [node.op_type for node in graph].count("Transpose") == 4  # two queries, the keys and the values


@pytest.mark.thorough
def test_a_bug_of_ours_is_not_blamed_on_the_model(bert, tmp_path, monkeypatch, capsys):
    def fuse(graph):
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(onnx_export, "fuse", fuse)
    assert main(["export", str(bert), "--format", "onnx", "--out", str(tmp_path / "onnx")]) == 1
    said = capsys.readouterr().err
    assert "IndexError: tuple index out of range" in said
    assert "cannot be written as a graph" not in said


@pytest.mark.thorough
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_inputs_of_8_bits_are_near_those_of_16(tmp_path, values, capsys):
    source, logits = save("bert", tmp_path / "model", share=0.5), {}
    for bits in ("8", "16"):
        options = ["--values", values, "--group", "row", "--activation-bits", bits, "--json"]
        assert main(["export", str(source), "--format", "onnx", *options, "--out", str(tmp_path / bits)]) == 0
        facts = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert facts["activation_bits"] == int(bits)
        session = open_session(tmp_path / bits / "model.onnx", threads=1)
        logits[bits] = np.concatenate([session.run(None, feed)[0] for feed in feeds(session)])
    apart = np.abs(logits["8"] - logits["16"]).max() / np.abs(logits["16"]).max()
    assert apart < 0.05
    assert (apart > 0) == (LEVELS[best_level()] in ("avx512", "amx"))
    nodes = [node for node in onnx.load(tmp_path / "8" / "model.onnx").graph.node if node.op_type == "SparseLinear"]
    assert {one.i for node in nodes for one in node.attribute if one.name == "activation_bits"} == {8}


@pytest.mark.parametrize("options", [["--format", "bitmask", "--values", "int8"], ["--format", "onnx"]])
def test_inputs_of_8_bits_are_for_codes_in_onnx_alone(bert, tmp_path, capsys, options):
    assert main(["export", str(bert), *options, "--activation-bits", "8", "--out", str(tmp_path / "out")]) == 2
    assert "and for --format onnx with quantised weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plain_is_for_onnx_alone(bert, tmp_path, capsys):
    assert main(["export", str(bert), "--format", "bitmask", "--plain", "--out", str(tmp_path / "out")]) == 2
    assert "--plain is for --format onnx" in capsys.readouterr().err


def test_another_folder_is_not_overwritten(bert, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not an ONNX export"):
        onnx_folder.require_free(tmp_path / "mine")
