"""Folders of codes and scales load through plain ``from_pretrained``, dense and sparse; the dense folder of the weights
that they stand for is the reference."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    pipeline,
)

from pst_ds.formats import FormatError
from pst_ds.hf import PackedFolderError, PackedWeightsConfig
from pst_ds.hf.tables import LoadingTable
from pst_ds.runtime import sparse_layers
from tests.hf.test_quantizer import IDS, assert_equal_models, load, same_bits
from tests.pairs import every_pair

CASES = [
    ("llama", AutoModelForCausalLM),
    ("llama", AutoModel),
    ("tied llama", AutoModelForCausalLM),
    ("classifier", AutoModelForSequenceClassification),
    ("bert", AutoModelForSequenceClassification),
    ("masked bert", AutoModelForMaskedLM),
    ("gpt2", AutoModelForCausalLM),
    ("gpt2", AutoModel),
]
HOW = [("bitmask", 8, 8, None), ("bitmask", 4, 4, None), ("2:4", 4, 8, None), ("dense", 8, None, None),
       ("dense", 4, 4, None), ("bitmask", 16, 4, None)]  # fmt: skip
Q_PROJ = "model.layers.1.self_attn.q_proj"


@every_pair
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize(("name", "auto_class"), CASES, ids=[f"{n}-{c.__name__}" for n, c in CASES])
def test_dense_is_the_model_of_the_rounded_weights_to_the_bit(quantized, name, auto_class, how):
    folder, dense = quantized(name, *how)
    loaded, reference = load(auto_class, folder, "dense"), auto_class.from_pretrained(dense)
    assert_equal_models(loaded, reference)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS)[0], reference(IDS)[0], rtol=1e-5, atol=1e-5)


@every_pair
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize(("name", "auto_class"), CASES, ids=[f"{n}-{c.__name__}" for n, c in CASES])
def test_sparse_keeps_codes_of_linear_layers(quantized, name, auto_class, how):
    folder, dense = quantized(name, *how)
    loaded, reference = load(auto_class, folder, "sparse"), auto_class.from_pretrained(dense)
    kept = sparse_layers(loaded)
    assert len(kept) > 7
    assert not any(isinstance(module, LoadingTable) for module in loaded.modules())
    for layer_name, layer in kept.items():
        linear = reference.get_submodule(layer_name)
        weight = linear.weight.t() if type(linear).__name__ == "Conv1D" else linear.weight
        assert same_bits(layer.dense_weight(), weight.detach().contiguous())
        assert torch.equal(layer.weight, linear.weight)
    rest = {key: value for key, value in reference.state_dict().items() if key.rpartition(".")[0] not in kept}
    assert all(same_bits(loaded.state_dict()[key], value) for key, value in rest.items())
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS)[0], reference(IDS)[0], rtol=1e-5, atol=1e-5)
    assert_equal_models(loaded.dequantize(), reference)


@pytest.mark.parametrize(("how", "sparse"), [(HOW[0], False), (HOW[3], False), (HOW[5], True)], ids=str)
def test_codes_are_unpacked_without_being_asked_and_that_is_said(quantized, how, sparse, caplog):
    loaded = AutoModelForCausalLM.from_pretrained(quantized("llama", *how)[0])
    assert bool(sparse_layers(loaded)) is sparse
    said = [record.getMessage() for record in caplog.records if record.name.startswith("pst_ds")]
    assert len(said) == (not sparse)
    assert all("int8" in line and "--format onnx" in line and "pst_ds.inference.decoder" in line for line in said)
    assert not any("\n" in line for line in said)


@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_nothing_is_said_to_whoever_chose(quantized, load_as, caplog):
    load(AutoModelForCausalLM, quantized("llama", "bitmask")[0], load_as)
    assert not [record for record in caplog.records if record.name.startswith("pst_ds")]


@pytest.mark.parametrize("group", [32, None])
def test_groups_of_inputs(quantized, group):
    folder, dense = quantized("gpt2", "bitmask", 4, 8, group)
    assert_equal_models(load(AutoModelForCausalLM, folder, "dense"), AutoModelForCausalLM.from_pretrained(dense))


@every_pair
@pytest.mark.parametrize("load_as", ["dense", "sparse"])
@pytest.mark.parametrize("asked", [torch.bfloat16, torch.float16, torch.float32])
def test_any_dtype_is_rounded_once(quantized, load_as, asked):
    """The folder says fp32, so its dense weights are code * scale exactly."""
    folder, dense = quantized("tied llama", "bitmask", 8, 4)
    loaded = load(AutoModelForCausalLM, folder, load_as, dtype=asked)
    exact = AutoModelForCausalLM.from_pretrained(dense)
    for name, layer in {**sparse_layers(loaded), "model.embed_tokens": loaded.model.embed_tokens}.items():
        weight = layer.dense_weight() if name in sparse_layers(loaded) else layer.weight
        assert same_bits(weight.detach(), exact.get_submodule(name).weight.to(asked))
    if load_as == "sparse":
        assert all(layer.scales.dtype == torch.bfloat16 for layer in sparse_layers(loaded).values())
    with torch.no_grad():
        logits = loaded(IDS).logits
    assert logits.dtype == asked
    torch.testing.assert_close(logits.float(), exact(IDS).logits, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_a_tied_output_layer_shares_the_table(quantized, load_as):
    model = load(AutoModelForCausalLM, quantized("tied llama", "bitmask", 4, 4)[0], load_as)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    assert not model.model.embed_tokens.weight.is_meta


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_a_model_that_reads_the_weight_of_a_projection(quantized, load_as, dtype):
    """T5 looks at ``wo.weight`` in its forward pass, and keeps that layer in fp32 when the rest is fp16."""
    folder, dense = quantized("t5", "bitmask", 8, 8)
    model = load(AutoModelForSeq2SeqLM, folder, load_as, dtype=dtype)
    reference = AutoModelForSeq2SeqLM.from_pretrained(dense, dtype=dtype)
    assert model.decoder.block[1].layer[2].DenseReluDense.wo.weight.dtype == torch.float32
    assert model.shared.weight is model.encoder.embed_tokens.weight is model.decoder.embed_tokens.weight
    with torch.no_grad():
        found, wanted = (m(IDS, decoder_input_ids=IDS).logits for m in (model, reference))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_pipelines(quantized, load_as):
    model = load(AutoModelForSequenceClassification, quantized("bert", "bitmask", 4, 8)[0], load_as)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("tests/data/tiny-bert")
    said = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")("a good film")
    assert 0 < said[0]["score"] <= 1


def _edited(quantized, tmp_path, change, *how):
    folder = tmp_path / "edited"
    shutil.copytree(quantized("llama", *how)[0], folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


@every_pair
@pytest.mark.parametrize("load_as", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        (Q_PROJ, "scales", lambda t: t.index_fill(0, torch.tensor([3]), 0.0), "scale 0 of row 3 is 0"),
        (Q_PROJ, "scales", lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), "scale 0 of row 3 is nan"),
        (Q_PROJ, "scales", lambda t: t[:-1], "needs torch.bfloat16 of shape"),
        (Q_PROJ, "scales", lambda t: t.expand(-1, 3), "3 scales per row of 32 inputs: a scale must be for"),
        (Q_PROJ, "scales", lambda t: t.float(), "needs torch.bfloat16 of shape"),
        (Q_PROJ, "codes", lambda t: t[:-1], "bitmask keeps"),
        (Q_PROJ, "codes", lambda t: t.view(torch.int8), "bitmask keeps"),
        (Q_PROJ, "bitmask", lambda t: t[:-1], "bitmask is damaged: a 32 x 32 matrix needs one stream of 128 bytes"),
        (Q_PROJ, "bitmask", lambda t: t.flip(0), "bitmask is damaged: Error -3 while decompressing"),
        (Q_PROJ, "bitmask", lambda t: t.short(), "needs torch.uint8 of shape"),
        (Q_PROJ, "codes", lambda t: t.float(), "is not a dtype of packed weights"),
        ("model.embed_tokens", "scales", lambda t: t * float("inf"), "scale 0 of row 0 is inf"),
        ("model.embed_tokens", "codes", lambda t: t[:-1], "needs torch.uint8 of shape"),
        ("model.embed_tokens", "shape", lambda t: t.flip(0), "its shape is"),
    ],
)  # fmt: skip
def test_parts_that_are_no_weight_are_refused_by_name(quantized, tmp_path, name, part, change, message, load_as):
    key = f"{name}.{part}"
    how = ("bitmask", 4, 4)
    folder = _edited(quantized, tmp_path, lambda t: t.update({key: change(t[key]).contiguous().clone()}), *how)
    with pytest.raises((PackedFolderError, FormatError), match=message) as caught:
        load(AutoModelForCausalLM, folder, load_as)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_every_single_missing_tensor_is_named(quantized, tmp_path, load_as):
    (path,) = quantized("llama", "bitmask", 4, 4)[0].glob("*.safetensors")
    for name in [name for name in load_file(path) if "layers.1" in name or "layers" not in name]:
        folder = _edited(quantized, tmp_path, lambda tensors, name=name: tensors.pop(name), "bitmask", 4, 4)
        with pytest.raises(PackedFolderError) as caught:
            load(AutoModelForCausalLM, folder, load_as)
        assert str(caught.value).startswith(name.rpartition(".")[0])
        shutil.rmtree(folder)


def test_a_whole_table_is_missing(quantized, tmp_path):
    def drop(tensors):
        for part in ("codes", "scales", "shape"):
            del tensors[f"model.embed_tokens.{part}"]

    with pytest.raises(PackedFolderError, match=r"model\.embed_tokens\.weight: missing in the folder"):
        load(AutoModelForCausalLM, _edited(quantized, tmp_path, drop, "bitmask", 4, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": "int5"}, "quantised values are int8 or int4, got 'int5'"),
        ({"values": ["int4"]}, "quantised values are int8 or int4"),
        ({"group": 48}, "a group is 32, 64, 128 or row, got 48"),
        ({"group": None}, "values and group must be given together"),
        ({"embeddings": "int2"}, "got 'int2'"),
        ({"format": "csr"}, "csr holds values of the model's dtype only"),
        ({"format": "zip"}, "format must be one of dense, bitmask, 2:4, csr, got 'zip'"),
        ({"format_version": 1}, "version 1, which this version of pst-ds does not read"),
        ({"format_version": 4}, "version 4, which this version of pst-ds does not read. Use a newer pst-ds"),
        ({"scales": "bf16"}, "unknown key 'scales'"),
    ],
)
def test_settings_in_config_json(quantized, tmp_path, changes, message):
    folder = _edited(quantized, tmp_path, lambda tensors: None, "bitmask", 4, 4)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackedFolderError) as caught:
        load(AutoModelForCausalLM, folder)
    assert message in str(caught.value)


def test_the_config_goes_round():
    said = {"quant_method": "pst_ds", "format": "bitmask", "format_version": 2, "values": "int4", "group": 64,
            "embeddings": "int8", "embedding_group": "row", "weights_file": "pst_bitmask.safetensors"}  # fmt: skip
    assert PackedWeightsConfig(**said).to_dict() == said
