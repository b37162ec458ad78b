"""Packed folders load through plain ``from_pretrained``; the dense folder of the same model is the reference."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from pst_ds.hf import PackedWeightsConfig
from pst_ds.hf.layers import LoadingProjection
from pst_ds.hf.weight_files import PackedFolderError
from pst_ds.runtime import SparseLinear, sparse_layers
from tests.pairs import every_pair

FORMATS = ("bitmask", "2:4", "csr")
CASES = [
    ("llama", AutoModelForCausalLM, 15),
    ("llama", AutoModel, 14),
    ("tied llama", AutoModelForCausalLM, 14),
    ("classifier", AutoModelForSequenceClassification, 15),
    ("bert", AutoModelForSequenceClassification, 14),
    ("bert", AutoModel, 13),
    ("masked bert", AutoModelForMaskedLM, 13),
    ("gpt2", AutoModelForCausalLM, 8),
    ("gpt2", AutoModel, 8),
]
"""Model of the folder, class that loads it, number of its packed layers in that class."""
IDS = torch.tensor([[1, 5, 7, 9, 3, 30]])


def load(auto_class, folder, load_as="auto", **kwargs):
    return auto_class.from_pretrained(folder, quantization_config=PackedWeightsConfig(load_as), **kwargs)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_equal_models(loaded, reference):
    found, wanted = loaded.state_dict(), reference.state_dict()
    assert list(found) == list(wanted)
    assert [name for name in wanted if not same_bits(found[name].contiguous(), wanted[name].contiguous())] == []
    assert [type(m) for m in loaded.modules()] == [type(m) for m in reference.modules()]


@every_pair
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("name", "auto_class", "layers"), CASES, ids=[f"{n}-{c.__name__}" for n, c, _ in CASES])
def test_dense_is_the_dense_export_to_the_bit(packed, name, auto_class, layers, form):
    folder, dense = packed(name, form)
    loaded, reference = load(auto_class, folder, "dense"), auto_class.from_pretrained(dense)
    assert_equal_models(loaded, reference)
    assert all(
        a.requires_grad == b.requires_grad for a, b in zip(loaded.parameters(), reference.parameters(), strict=True)
    )
    with torch.no_grad():  # weights of a file lie at any address, and the order of a sum may hang on it
        torch.testing.assert_close(loaded(IDS)[0], reference(IDS)[0], rtol=1e-5, atol=1e-5)


@every_pair
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("name", "auto_class", "layers"), CASES, ids=[f"{n}-{c.__name__}" for n, c, _ in CASES])
def test_sparse_keeps_every_packed_layer(packed, name, auto_class, layers, form):
    folder, dense = packed(name, form)
    loaded, reference = load(auto_class, folder, "sparse"), auto_class.from_pretrained(dense)
    kept = sparse_layers(loaded)
    assert len(kept) == layers
    assert not any(isinstance(layer, LoadingProjection) for layer in kept.values())
    for layer_name, layer in kept.items():
        linear = reference.get_submodule(layer_name)
        weight = linear.weight.t() if type(linear).__name__ == "Conv1D" else linear.weight
        assert same_bits(layer.dense_weight(), weight.detach().contiguous())
        assert torch.equal(layer.weight, linear.weight)
        assert not any(param.requires_grad for param in layer.parameters())
    rest = {key: value for key, value in reference.state_dict().items() if key.rpartition(".")[0] not in kept}
    assert rest.keys() <= loaded.state_dict().keys()
    assert all(same_bits(loaded.state_dict()[key], value) for key, value in rest.items())
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS)[0], reference(IDS)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("form", "sparse"), [("bitmask", True), ("2:4", False), ("csr", False)])
def test_bitmask_alone_is_kept_sparse_without_being_asked(packed, form, sparse):
    loaded = AutoModelForCausalLM.from_pretrained(packed("llama", form)[0])
    assert bool(sparse_layers(loaded)) is sparse


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_a_model_that_reads_the_weight_of_a_projection(packed, load_as, dtype):
    """T5 looks at ``wo.weight`` in its forward pass, and keeps that layer in fp32 when the rest is fp16."""
    folder, dense = packed("t5", "bitmask")
    model = load(AutoModelForSeq2SeqLM, folder, load_as, dtype=dtype)
    reference = AutoModelForSeq2SeqLM.from_pretrained(dense, dtype=dtype)
    assert model.decoder.block[1].layer[2].DenseReluDense.wo.weight.dtype == torch.float32
    with torch.no_grad():
        found, wanted = (m(IDS, decoder_input_ids=IDS).logits for m in (model, reference))
    torch.testing.assert_close(found, wanted)


def test_a_config_that_is_given_may_say_how_to_load(packed):
    folder, dense = packed("llama", "bitmask")
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["load_as"] = "dense"
    assert_equal_models(
        AutoModelForCausalLM.from_pretrained(folder, config=config), AutoModelForCausalLM.from_pretrained(dense)
    )
    assert not hasattr(config, "transformers_weights")


@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_shards(packed, load_as):
    folder, dense = packed("llama", "bitmask", shards=3)
    assert len(list(folder.glob("*.safetensors"))) == 3
    with torch.no_grad():
        found = load(AutoModelForCausalLM, folder, load_as)(IDS).logits
        torch.testing.assert_close(found, AutoModelForCausalLM.from_pretrained(dense)(IDS).logits)


@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_a_tied_output_layer_shares_the_embedding(packed, load_as):
    model = load(AutoModelForCausalLM, packed("tied llama", "bitmask")[0], load_as)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@every_pair
@pytest.mark.parametrize("load_as", ["dense", "sparse"])
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_casts_the_values_as_it_does_dense_weights(packed, auto_class, stored, asked, found, load_as):
    folder, dense = packed("llama", "bitmask", stored)
    model, reference = load(auto_class, folder, load_as, dtype=asked), auto_class.from_pretrained(dense, dtype=asked)
    assert {param.dtype for param in model.parameters()} == {found}
    if load_as == "sparse":
        model = model.dequantize()
    assert_equal_models(model, reference)


@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_a_value_that_a_cast_makes_zero_is_no_negative_zero(edited, load_as):
    def tiny(tensors):
        tensors["model.layers.0.mlp.up_proj.compressed"][:] = -1e-30

    folder = edited("llama", "bitmask", tiny)
    model = load(AutoModelForCausalLM, folder, load_as, dtype=torch.float16)
    up = model.model.layers[0].mlp.up_proj
    weight = up.weight if load_as == "dense" else up.dense_weight()
    assert not torch.signbit(weight).any()
    assert not weight.any()


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2"])
def test_generate_gives_the_tokens_of_the_dense_model(packed, name):
    folder, dense = packed(name, "bitmask")
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    wanted = AutoModelForCausalLM.from_pretrained(dense).generate(IDS, **how)
    assert torch.equal(load(AutoModelForCausalLM, folder, "sparse").generate(IDS, **how), wanted)
    assert wanted.shape[1] > IDS.shape[1]


@every_pair
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_device_map(packed, device_map, load_as):
    folder, dense = packed("llama", "bitmask")
    if device_map == "auto" and torch.accelerator.is_available():
        pytest.skip("an accelerator is there, and 'auto' uses it")
    model = load(AutoModelForCausalLM, folder, load_as, device_map=device_map)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, AutoModelForCausalLM.from_pretrained(dense)(IDS).logits)


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}])
def test_offloading_to_disk_is_refused(packed, tmp_path, device_map):
    with pytest.raises(PackedFolderError, match="disk is not supported"):
        load(AutoModelForCausalLM, packed("llama", "bitmask")[0], device_map=device_map, offload_folder=tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2", "tied llama"])
def test_a_dense_loaded_model_saves_as_an_ordinary_one(packed, tmp_path, name):
    folder, dense = packed(name, "bitmask")
    load(AutoModelForCausalLM, folder, "dense").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {"quantization_config", "transformers_weights", "_is_quantized"}.isdisjoint(config)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(dense / "model.safetensors").keys()
    assert_equal_models(AutoModelForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(dense))


def test_a_sparse_model_refuses_to_save_and_saves_after_dequantize(packed, tmp_path):
    folder, dense = packed("gpt2", "csr")
    model = load(AutoModelForCausalLM, folder, "sparse")
    with pytest.raises(PackedFolderError, match=r"model\.dequantize\(\)"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.dequantize().save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_equal_models(
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(dense)
    )


def test_dequantize_casts_when_asked(packed):
    model = load(AutoModelForCausalLM, packed("llama", "bitmask")[0], "sparse").dequantize(torch.bfloat16)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert not sparse_layers(model)


def test_a_sparse_model_says_that_it_cannot_be_trained(packed):
    model = load(AutoModelForCausalLM, packed("llama", "bitmask")[0], "sparse")
    assert model.is_quantized
    assert model.hf_quantizer.is_trainable is False
    assert (
        model.config.quantization_config.to_dict()
        == json.loads((packed("llama", "bitmask")[0] / "config.json").read_text())["quantization_config"]
    )


def test_layers_are_unpacked_one_at_a_time(packed, monkeypatch):
    """Loading dense takes the dense model and one packed layer: no packed layer outlives its turn."""
    values, alive = [], []
    unpack, check = SparseLinear.dense_weight, SparseLinear.check
    monkeypatch.setattr(
        SparseLinear, "check", lambda layer, name: (values.append(weakref.ref(layer.compressed)), check(layer, name))
    )

    def dense_weight(layer):
        alive.append(sum(ref() is not None for ref in values))
        return unpack(layer)

    monkeypatch.setattr(SparseLinear, "dense_weight", dense_weight)
    load(AutoModelForCausalLM, packed("llama", "bitmask")[0], "dense")
    assert alive == list(range(15, 0, -1))
