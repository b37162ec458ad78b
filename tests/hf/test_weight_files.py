"""A packed folder that is not whole, or not this model's, is an error that names what is wrong."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from pst_ds.formats import FormatError
from pst_ds.hf import PackedFolderError, PackedWeightsConfig
from tests.pairs import every_pair

Q_PROJ = "model.layers.1.self_attn.q_proj"


def load(folder, auto_class=AutoModelForCausalLM, **kwargs):
    return auto_class.from_pretrained(folder, **kwargs)


@pytest.fixture
def copied(packed, tmp_path):
    def copy(name, form, **kwargs):
        shutil.copytree(packed(name, form, **kwargs)[0], tmp_path / "copy")
        return tmp_path / "copy"

    return copy


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["bitmask", "2:4", "csr"])
@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_every_single_missing_tensor_is_named(edited, packed, tmp_path, form, load_as):
    stem = {"bitmask": "pst_bitmask", "2:4": "pst_2of4", "csr": "pst_csr"}[form]
    names = list(load_file(packed("llama", form)[0] / f"{stem}.safetensors"))
    absent = [name for name in names if "layers.1" in name or "layers" not in name]
    assert len(absent) > 25
    for name in absent:
        folder = edited("llama", form, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(PackedFolderError) as caught:
            load(folder, quantization_config=PackedWeightsConfig(load_as))
        assert str(caught.value).startswith(f"{name}: ")
        shutil.rmtree(folder)


def test_a_whole_layer_is_missing(edited):
    def drop(tensors):
        for part in ("compressed", "bitmask", "row_offsets", "shape"):
            del tensors[f"{Q_PROJ}.{part}"]

    with pytest.raises(PackedFolderError, match=rf"{Q_PROJ}.weight: missing in the folder; LlamaForCausalLM"):
        load(edited("llama", "bitmask", drop))


@pytest.mark.parametrize("name", ["gpt2", "bert", "tied llama"])
def test_a_missing_bias_or_embedding_of_other_models(edited, name):
    dropped = {"gpt2": "transformer.h.0.attn.c_attn.bias", "bert": "bert.embeddings.word_embeddings.weight"}
    key = dropped.get(name, "model.embed_tokens.weight")
    auto_class = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    folder = edited(name, "bitmask", lambda tensors: tensors.pop(key))
    with pytest.raises(PackedFolderError, match=f"{key}.*: missing in the folder"):
        load(folder, auto_class)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("model.layers.1.self_attn.extra", torch.zeros(2)),
        ("model.layers.7.self_attn.q_proj.compressed", torch.zeros(2)),
        (f"{Q_PROJ}.weight", torch.zeros(32, 32)),
        (f"{Q_PROJ}.bias", torch.zeros(32)),
        ("other_head.weight", torch.zeros(32)),
    ],
)
def test_a_tensor_that_the_model_has_not(edited, key, tensor):
    folder = edited("llama", "bitmask", lambda tensors: tensors.update({key: tensor}))
    with pytest.raises(PackedFolderError, match=rf"{key}.*: in the folder, but LlamaForCausalLM has no such tensor"):
        load(folder)


def test_a_base_model_leaves_the_head_out_and_nothing_else(edited):
    folder = edited("llama", "bitmask", lambda tensors: None)
    assert type(load(folder, AutoModel)).__name__ == "LlamaModel"
    shutil.rmtree(folder)
    folder = edited("llama", "bitmask", lambda tensors: tensors.update({"model.more": torch.zeros(1)}))
    with pytest.raises(PackedFolderError, match=r"model\.more: in the folder, but LlamaModel"):
        load(folder, AutoModel)


def test_a_head_that_the_folder_has_not(packed):
    with pytest.raises(
        PackedFolderError, match=r"score\.weight: missing .* The folder holds LlamaForCausalLM: load it"
    ):
        load(packed("llama", "bitmask")[0], AutoModelForSequenceClassification)


@every_pair
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("key", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_dense_tensor_of_another_shape(edited, key, ignore):
    folder = edited("llama", "bitmask", lambda tensors: tensors.update({key: torch.zeros(3, 5)}))
    with pytest.raises((PackedFolderError, RuntimeError), match=key if ignore else None):
        load(folder, ignore_mismatched_sizes=ignore)


@every_pair
@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("bitmask", torch.zeros(32, 4, dtype=torch.int8), "needs torch.uint8 of shape"),
        ("bitmask", torch.zeros(32, 3, dtype=torch.uint8), "needs torch.uint8 of shape"),
        ("bitmask", torch.zeros(32, 4, dtype=torch.uint8), "keeps 0 positions"),
        ("row_offsets", torch.zeros(32, dtype=torch.int64), "row_offsets"),
        ("row_offsets", torch.zeros(31, dtype=torch.int64), "needs torch.int64 of shape"),
        ("compressed", torch.zeros(512, dtype=torch.int32), "is not a dtype of packed weights"),
        ("compressed", torch.zeros(16, 32), r"of shape \(512,\), .*Is it the folder of another model"),
        ("compressed", torch.full((512,), -0.0), "-0.0"),
        ("shape", torch.tensor([64, 16]), "shape"),
        ("shape", torch.tensor([32, 32, 1]), "needs torch.int64 of shape"),
    ],
)
@pytest.mark.parametrize("load_as", ["dense", "sparse"])
def test_parts_that_are_no_weight_are_refused_by_name(edited, part, tensor, message, load_as):
    folder = edited("llama", "bitmask", lambda tensors: tensors.update({f"{Q_PROJ}.{part}": tensor}))
    with pytest.raises((PackedFolderError, FormatError), match=message) as caught:
        load(folder, quantization_config=PackedWeightsConfig(load_as))
    assert str(caught.value).startswith(Q_PROJ)


def test_a_column_outside_the_matrix(edited):
    def out(tensors):
        tensors[f"{Q_PROJ}.col_indices"].view(torch.int16)[15] = 32

    with pytest.raises(FormatError, match=f"^{Q_PROJ}"):
        load(edited("llama", "csr", out))


def test_the_same_layer_with_and_without_its_prefix(edited):
    def twice(tensors):
        for part in ("compressed", "bitmask", "row_offsets", "shape"):
            tensors[f"{Q_PROJ}.{part}".removeprefix("model.")] = tensors[f"{Q_PROJ}.{part}"].clone()

    with pytest.raises(PackedFolderError, match="twice, with and without its prefix"):
        load(edited("llama", "bitmask", twice))


def test_a_packed_weight_that_the_model_ties(copied):
    folder = copied("llama", "bitmask")
    _edit_config(folder, lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(PackedFolderError, match=r"^lm_head: packed in the folder, but this model ties it"):
        load(folder)


def test_a_folder_of_another_size(copied):
    folder = copied("llama", "bitmask")
    _edit_config(folder, lambda config: config.update(intermediate_size=64))
    with pytest.raises(PackedFolderError, match=r"mlp\.\w+_proj\.bitmask: .* Is it the folder of another model\?"):
        load(folder)


def test_a_truncated_file(copied):
    folder = copied("llama", "bitmask")
    path = folder / "pst_bitmask.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PackedFolderError, match=r"pst_bitmask\.safetensors: not a readable safetensors file"):
        load(folder)


def test_a_tensor_in_two_shards(copied):
    folder = copied("llama", "bitmask", shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(second)
    tensors |= {name: tensor.clone() for name, tensor in load_file(first).items()}
    save_file(tensors, second, {"format": "pt"})
    with pytest.raises(PackedFolderError, match=rf"stored in {first.name} and in {second.name}"):
        load(folder)


def test_a_missing_shard_and_a_missing_file(copied):
    folder = copied("llama", "bitmask", shards=2)
    next(folder.glob("*00001-of*")).unlink()
    with pytest.raises(PackedFolderError, match="00001-of-00002"):
        load(folder)
    (folder / "pst_bitmask.safetensors.index.json").unlink()
    with pytest.raises((OSError, ValueError), match="pst_bitmask"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "rle"}, "format must be one of dense, bitmask, 2:4, csr, got 'rle'"),
        ({"format": None}, "format must be one of"),
        ({"format_version": 4}, "version 4, which this version of pst-ds does not read. Use a newer pst-ds"),
        ({"weights_file": "../pst_bitmask.safetensors"}, "weights_file = '../pst_bitmask.safetensors' is not"),
        ({"weights_file": "/tmp/pst_bitmask.safetensors"}, "is not a weight file of a folder packed as bitmask"),
        ({"weights_file": "pytorch_model.bin"}, "is not a weight file of a folder packed as bitmask"),
        ({"weights_file": None}, "weights_file = 'None' is not"),
        ({"wieghts_file": "x"}, "unknown key 'wieghts_file'. Known: load_as, format, "),
        ({"load_as": "fast"}, "load_as is 'auto', 'dense' or 'sparse', got 'fast'"),
    ],
)
def test_settings_in_config_json(copied, changes, message):
    folder = copied("llama", "bitmask")
    _edit_config(folder, lambda config: config["quantization_config"].update(changes))
    with pytest.raises(PackedFolderError) as caught:
        load(folder)
    assert message in str(caught.value)


def test_another_format_than_the_files_have(copied):
    folder = copied("llama", "bitmask")
    _edit_config(folder, lambda config: config["quantization_config"].update(format="csr"))
    with pytest.raises(PackedFolderError, match="is not a weight file of a folder packed as csr"):
        load(folder)


def test_the_config_is_for_packed_folders(packed):
    with pytest.raises(PackedFolderError, match=r"has no quantization_config of pst_ds\. Load it without, or pack it"):
        load(packed("llama", "bitmask")[1], quantization_config=PackedWeightsConfig("dense"))


def test_a_config_of_another_method_is_refused(packed):
    other = transformers.TorchAoConfig if not hasattr(transformers, "EetqConfig") else transformers.EetqConfig
    with pytest.raises(ValueError, match="PackedWeightsConfig"):
        load(packed("llama", "bitmask")[0], quantization_config=other())


def test_a_transformers_that_skips_the_check_is_found_out(packed, monkeypatch):
    monkeypatch.setattr(
        "pst_ds.hf.quantizer.PackedWeightsQuantizer._finish", lambda self, model, keys, adjust, *i: adjust(*i)
    )
    with pytest.raises(RuntimeError, match="the packed weights were not checked"):
        load(packed("llama", "bitmask")[0])


def _edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
