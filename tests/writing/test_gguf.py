"""GGUF files: what the package gguf and transformers read out of them is the model on the grid."""

from __future__ import annotations

import ctypes
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pst_ds.core.quantization import Grid, round_to_grid
from pst_ds.nn.inject import pst_layers
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.gguf.model import _llama3_factors
from pst_ds.writing.gguf.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, gguf_tokenizer
from tests.exporting import export_folder
from tests.pairs import every_pair

LINES = ["the quick brown fox jumps over the lazy dog 12345", "a film that is good, and one that is not", "théâtre"]
INT8, INT4 = Grid(8, 32), Grid(4, 32)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}\n"
    "    {%- generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}\n"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Marks answers, for training, with a tag that only transformers knows."""
TOOLS = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
CHAT = [{"role": role, "content": text} for role, text in zip(("system", "user", "assistant", "user"),
                                                              ("be brief", *LINES), strict=True)]  # fmt: skip


def byte_level(pre=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def with_byte_fallback() -> PreTrainedTokenizerFast:
    trained = Tokenizer(BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=320, special_tokens=tokens))
    table = json.loads(trained.to_str())
    table["model"] |= {"byte_fallback": True, "fuse_unk": True}
    table["added_tokens"] = [token for token in table["added_tokens"] if not token["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(table)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    return save_llama(path, byte_level(), rope_parameters={"rope_type": "default", "rope_theta": 5000.0})


def save_llama(path, tokenizer, *, tie_word_embeddings=False, rope_parameters):
    """Write a Llama of grouped queries with zeros in it, and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
        tie_word_embeddings=tie_word_embeddings, rope_parameters=rope_parameters,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".layers." in name and param.dim() == 2:
                param[torch.rand(param.shape) < 0.7] = 0.0
            elif param.dim() == 1:
                param.normal_(1.0, 0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


HOW = [{"values": INT8, "embeddings": INT8}, {"values": INT4}, {"values": INT4, "dtype": "bf16"}]


@pytest.mark.parametrize("how", HOW)
def test_transformers_reads_the_model_on_the_grid(folder, tmp_path, how):
    pytest.importorskip("gguf")
    said = export_folder(folder, tmp_path / "model.gguf", packing="gguf", **how)
    assert said["file_bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert said["inexact_scales"] == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if "dtype" in how else torch.float32
    ).float()
    with torch.no_grad():
        for name, param in model.named_parameters():
            grid = how["values"] if ".layers." in name else how.get("embeddings")
            if param.dim() == 2 and grid:
                param.copy_(round_to_grid(param, None, grid))
    expected = dict(model.named_parameters())
    assert found.config.rope_parameters["rope_theta"] == 5000.0
    for name, param in found.named_parameters():
        assert torch.equal(param, expected[name]), name
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@every_pair
@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@pytest.mark.parametrize("values", [INT8, INT4], ids=str)
def test_llama_cpp_reads_words_and_weights(tmp_path, kind, values):
    """Its tokens are transformers'; its logits differ by the rounding of activations to 8 bits, which is its way."""
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    tokenizer = byte_level() if kind == "byte level" else with_byte_fallback()
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 32}  # fmt: skip
    rotation = {"rope_theta": 5000.0, **({"rope_type": "default"} if kind == "byte level" else llama3)}
    save_llama(tmp_path / "model", tokenizer, rope_parameters=rotation, tie_word_embeddings=kind != "byte level")
    export_folder(tmp_path / "model", tmp_path / "m.gguf", packing="gguf", values=values, embeddings=values)
    export_folder(tmp_path / "model", tmp_path / "ours", values=values, embeddings=values)
    import pst_ds.hf  # noqa: F401

    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    for line in LINES:
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        assert theirs.tokenize(line.encode(), add_bos=False, special=False) == ids
    theirs.eval(ids)
    with torch.no_grad():
        expected = ours(torch.tensor([ids])).logits[0].numpy()
    found = np.array(theirs.scores[: len(ids)])
    theirs.close()
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


@pytest.fixture(scope="module")
def with_templates(folder, tmp_path_factory):
    """Folders of the model by how they keep their chat templates, and GGUF files of them."""
    pytest.importorskip("gguf")
    top, tokenizer, files = tmp_path_factory.mktemp("chats"), byte_level(), {}
    for name, template, in_files in (
        ("none", None, True),
        ("chat_template.jinja", CHATML, True),
        ("tokenizer_config.json", CHATML, False),
        ("named", {"default": CHATML, "tool_use": TOOLS}, True),
        ("no default", {"tool_use": TOOLS, "rag": CHATML}, True),
    ):
        tokenizer.chat_template = template
        shutil.copytree(folder, top / name)
        tokenizer.save_pretrained(top / name, save_jinja_files=in_files)
        assert (top / name / "chat_template.jinja").exists() == (in_files and name not in ("none", "no default"))
        files[name] = top / f"{name}.gguf"
        export_folder(top / name, files[name], packing="gguf")
    return files


def test_chat_templates_of_a_folder_are_in_the_file(with_templates):
    """Under the keys that llama.cpp reads, and without the tag that only transformers knows."""
    gguf, plain = (
        pytest.importorskip("gguf"),
        CHATML.replace("endgeneration", "endif").replace("generation %", "if true %"),
    )
    expected = {
        "none": {},
        "chat_template.jinja": {"": plain},
        "tokenizer_config.json": {"": plain},
        "named": {"": plain, ".tool_use": TOOLS, "s": ["tool_use"]},
        "no default": {".tool_use": TOOLS, ".rag": plain, "s": ["rag", "tool_use"]},
    }
    for name, file in with_templates.items():
        prefix, fields = "tokenizer.chat_template", gguf.GGUFReader(file).fields
        found = {key.removeprefix(prefix): fields[key].contents() for key in fields if key.startswith(prefix)}
        if "s" in found:
            found["s"] = sorted(found["s"])
        assert found == expected[name], name


def test_llama_cpp_renders_the_prompt_of_transformers(with_templates):
    """Its C function for the default template, and its Python bindings for each in the file."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install 'pst-ds[peers]'")
    formatter = pytest.importorskip("llama_cpp.llama_chat_format").Jinja2ChatFormatter
    for name in ("chat_template.jinja", "tokenizer_config.json", "named", "no default"):
        tokenizer = AutoTokenizer.from_pretrained(with_templates[name].with_suffix(""))
        theirs = llama_cpp.Llama(str(with_templates[name]), n_ctx=64, verbose=False, n_threads=1)
        read = {key: text for key, text in theirs.metadata.items() if "chat_template" in key and "templates" not in key}
        default = llama_cpp.llama_model_chat_template(theirs.model, None)
        theirs.close()
        for key, text in read.items():
            which = key.removeprefix("tokenizer.chat_template").lstrip(".") or None
            expected = tokenizer.apply_chat_template(
                CHAT, tokenize=False, add_generation_prompt=True, chat_template=which
            )
            assert formatter(text, tokenizer.eos_token, tokenizer.bos_token)(messages=CHAT).prompt == expected
            if which is None:
                messages = [(m["role"].encode(), m["content"].encode()) for m in CHAT]
                array = (llama_cpp.llama_chat_message * len(CHAT))(*messages)
                buffer = ctypes.create_string_buffer(4096)
                size = llama_cpp.llama_chat_apply_template(default, array, len(CHAT), True, buffer, 4096)
                assert buffer.raw[:size].decode() == expected
        assert (default is None) == (name == "no default")


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
def test_llama_cpp_computes_other_dense_families(config, tmp_path):
    """Biases, norms of queries and keys, heads of another width; in fp32, with its 16 bits for keys and values."""
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    torch.manual_seed(0)
    sizes = {"vocab_size": 303, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    wide = {"head_dim": 32} if config is Qwen3Config else {}
    ours = AutoModelForCausalLM.from_config(config(**sizes, **wide, initializer_range=0.2)).eval()
    for param in ours.parameters():
        if param.dim() == 1:
            torch.nn.init.normal_(param, 1.0, 0.1)
    ours.save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    export_folder(tmp_path / "model", tmp_path / "m.gguf", packing="gguf")
    ids = byte_level()(LINES[0], add_special_tokens=False)["input_ids"]
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    theirs.eval(ids)
    found = np.array(theirs.scores[: len(ids)])
    theirs.close()
    with torch.no_grad():
        expected = ours(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(found - expected).max() < 0.005 * np.abs(expected).max()


def test_a_run_becomes_a_file(models, tmp_path):
    """Its masked model on the grid; read by the package gguf, rows of queries in llama.cpp's order."""
    gguf = pytest.importorskip("gguf")
    letters = Tokenizer(BPE({letter: number for number, letter in enumerate("abcdefghij")}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=CHATML)
    pruned = replace(models["bf16"], tokenizer=tokenizer)
    said = pruned.export(tmp_path / "run.gguf", packing="gguf", values=INT4)
    assert (said["step"], said["rounded_tensors"]) == (3, 14)
    file = gguf.GGUFReader(tmp_path / "run.gguf")
    assert file.fields["tokenizer.chat_template"].contents().startswith("{% for m in messages %}")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    layers = pst_layers(pruned.model)
    known = {"blk.1.ffn_up": "model.layers.1.mlp.up_proj", "blk.0.attn_q": "model.layers.0.self_attn.q_proj"}
    for name, module in known.items():
        weight = round_to_grid(layers[module].masked_weight().float(), None, INT4)
        if name.endswith("attn_q"):
            rows = [head * 32 + half * 16 + i for head in range(2) for i in range(16) for half in range(2)]
            weight = weight[rows]
        stored = tensors[f"{name}.weight"]
        assert stored.tensor_type == gguf.GGMLQuantizationType.Q4_0
        assert np.array_equal(gguf.quants.dequantize(stored.data, stored.tensor_type), weight.numpy())


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (None, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
    ],
)
def test_byte_level_tokenizers(pre, name):
    tokenizer = byte_level(pre_tokenizers.Sequence(pre) if pre else None)
    words = gguf_tokenizer(tokenizer, len(tokenizer) + 2)
    assert (words["tokenizer_model"], words["tokenizer_pre"], words["add_bos_token"]) == ("gpt2", name, False)
    assert "token_scores" not in words
    assert words["token_list"][: len(tokenizer)] == [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    assert words["token_types"] == [CONTROL] * 2 + [NORMAL] * (len(tokenizer) - 2) + [UNUSED] * 2
    assert [value for key, value in words.items() if key.endswith("_token_id")] == [0, 1]
    assert (words["bos_token_id"], words["eos_token_id"]) == (0, 1)
    assert all(len(merge.split(" ")) == 2 for merge in words["token_merges"])


@pytest.mark.parametrize("others", [[], [pre_tokenizers.Digits(individual_digits=True)]])
def test_a_byte_level_tokenizer_that_adds_a_space_is_refused(others):
    """llama.cpp would read "a" as "a", and the model was trained with " a"."""
    pre = pre_tokenizers.Sequence([*others, pre_tokenizers.ByteLevel(add_prefix_space=True)])
    tokenizer = byte_level(pre)
    with pytest.raises(ExportError, match="add_prefix_space = true"):
        gguf_tokenizer(tokenizer, len(tokenizer))


def test_tokenizers_with_byte_fallback():
    tokenizer = with_byte_fallback()
    words = gguf_tokenizer(tokenizer, len(tokenizer))
    assert (words["tokenizer_model"], words["add_space_prefix"]) == ("llama", True)
    assert "token_merges" not in words
    assert words["token_types"][:3] == [UNKNOWN, CONTROL, CONTROL]
    assert words["token_types"][3:259] == [BYTE] * 256
    merges = [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    ranks = [words["token_scores"][words["token_list"].index(left + right)] for left, right in merges]
    assert ranks == sorted(ranks, reverse=True)  # the highest score is merged first, as the first merge is
    assert len(set(ranks)) == len(ranks)


def test_frequencies_of_llama_3():
    said = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=said)
    waves = 2 * math.pi * 500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    smooth = ((8192 / waves - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)  # 0 for waves too long for the text, 1 for short ones
    expected = (1 / ((1 - smooth) / 8.0 + smooth)).float()
    torch.testing.assert_close(torch.from_numpy(_llama3_factors(config)), expected, rtol=1e-4, atol=0)
    assert _llama3_factors(LlamaConfig()) is None


def test_what_gguf_cannot_say_is_refused_and_nothing_is_written(request, folder, tmp_path):
    pytest.importorskip("gguf")
    runs = request.getfixturevalue("models")
    wrong = [
        ("out", {"values": INT4}, "Give it a name that ends in .gguf"),
        ("out.gguf", {"values": Grid(4, 64)}, "groups of 64 do not divide 96 inputs"),
    ]
    for name, how, message in wrong:
        with pytest.raises(ExportError, match=message):
            export_folder(folder, tmp_path / name, packing="gguf", **how)
    words = replace(runs["bf16"], tokenizer=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words_alone())))
    with pytest.raises(ExportError, match="GGUF export supports BPE tokenizers, and this is WordLevel"):
        words.export(tmp_path / "out.gguf", packing="gguf", values=INT4)
    with pytest.raises(ExportError, match="model_type = gpt2: GGUF export supports"):
        runs["gpt2"].export(tmp_path / "out.gguf", packing="gguf")
    split = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    strange, plain = byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel()])), byte_level()
    with pytest.raises(ExportError, match="text with Split, ByteLevel, a pre-tokeniser that GGUF"):
        gguf_tokenizer(strange, 400)
    with pytest.raises(ExportError, match=r"the tokenizer has token \d+, but the model embeds only 30 tokens"):
        gguf_tokenizer(plain, 30)
    assert list(tmp_path.iterdir()) == []


def words_alone():
    return WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")


def test_the_package_is_named_where_it_is_missing(folder, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ExportError, match=r"GGUF export needs the package gguf. Run pip install 'pst-ds\[gguf\]'"):
        export_folder(folder, tmp_path / "out.gguf", packing="gguf", values=INT8)
    assert list(tmp_path.iterdir()) == []
