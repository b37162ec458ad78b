"""Exports with values on a grid: from runs and folders, in every packing, held against numpy and the grid."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

import pst_ds.hf  # noqa: F401 (teaches transformers the format)
from pst_ds.core.quantization import Grid, grid_of, quantize, round_to_grid
from pst_ds.data.vocabulary import trim
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.formats import mask_row_bits
from pst_ds.formats.rows import as_bools
from pst_ds.nn.inject import pst_layers
from pst_ds.writing.check import check_export, check_model
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import read_manifest
from tests.exporting import export_folder, row_bits_by_numpy

INT8, INT4, INT4_32 = Grid(8), Grid(4), Grid(4, 32)
FILES = {"dense": "pst_dense", "bitmask": "pst_bitmask", "2:4": "pst_2of4"}
CASES = [
    ("llama", "bitmask", INT8, INT8),
    ("llama", "dense", INT4, None),
    ("2:4", "2:4", INT4, INT8),
    ("2:4", "bitmask", INT8, INT4),
    ("bf16", "bitmask", INT4_32, INT4_32),
    ("bf16", "dense", Grid(8, 32), INT4),
    ("gpt2", "bitmask", INT4, INT8),
    ("gpt2", "dense", INT8, None),
]


def _stored(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found


def by_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(codes, weight in float64), (O, I), of every tensor in codes, by the description of the layout."""
    found = {}
    for name in [name for name in tensors if name.endswith(".codes")]:
        module = name.removesuffix(".codes")
        rows, columns = tensors[f"{module}.shape"].flatten().tolist()
        stored, scales = tensors[name], tensors[f"{module}.scales"].double().numpy()
        keep = np.ones((rows, columns), bool)
        if f"{module}.bitmask" in tensors:
            bits = row_bits_by_numpy(tensors[f"{module}.bitmask"], rows)
            bits = np.unpackbits(bits, axis=1, bitorder="little")
            assert not bits[:, columns:].any()
            keep = bits[:, :columns].astype(bool)
        flat = stored.flatten().numpy()
        codes = np.zeros((rows, columns), np.int64)
        if stored.dtype == torch.int8:
            codes[keep] = flat
        else:
            halves = np.stack([flat & 15, flat >> 4], 1).flatten().astype(np.int64)
            halves = np.where(halves > 7, halves - 16, halves)
            at = 0
            for row in range(rows):
                count = keep[row].sum()
                codes[row, keep[row]] = halves[at : at + count]
                assert not halves[at + count : at + count + count % 2].any()
                at += count + count % 2
            assert at == len(halves)
        found[module] = codes, codes * np.repeat(scales, columns // scales.shape[1], axis=1)
    return found


@pytest.fixture(scope="module")
def exports(models, tmp_path_factory):
    top, made = tmp_path_factory.mktemp("exports"), {}
    for index, (name, packing, values, embeddings) in enumerate(CASES):
        made[index] = top / str(index)
        models[name].export(made[index], packing=packing, values=values, embeddings=embeddings)
    return made


@pytest.mark.parametrize(("index", "case"), enumerate(CASES), ids=str)
def test_a_run_is_its_masked_model_on_the_grid(models, exports, index, case):
    name, packing, values, embeddings = case
    pruned, found = models[name], by_numpy(_stored(exports[index]))
    for layer, module in pst_layers(pruned.model).items():
        weight = module.masked_weight()
        weight = weight.t().contiguous() if name == "gpt2" else weight
        keep = as_bools(mask_row_bits(pruned.checkpoint.masks[layer], module.layout), weight.shape[1])
        codes, _ = quantize(weight, keep, values)
        expected = round_to_grid(weight.float(), keep, values)
        assert np.array_equal(found[layer][0], codes.numpy())
        assert np.array_equal(found[layer][1], expected.double().numpy())
        assert not found[layer][1][~keep.numpy()].any()
    tables = set(found) - set(pst_layers(pruned.model))
    assert bool(tables) is bool(embeddings)
    for table in tables:
        weight = pruned.model.get_parameter(f"{table}.weight")
        assert np.array_equal(found[table][1], round_to_grid(weight.float(), None, embeddings).double().numpy())
    said = check_export(exports[index])
    check_model(exports[index])
    assert said["rounded_tensors"] == len(found)
    assert (said["values"], said["group"]) == (values.values, values.group or "row")
    assert said.get("embeddings") == (embeddings.values if embeddings else None)
    assert said["packed_tensors"] == (len(pst_layers(pruned.model)) if packing != "dense" else 0)


@pytest.mark.parametrize(("index", "case"), enumerate(CASES), ids=str)
def test_what_the_folder_says(models, exports, index, case):
    _, packing, values, embeddings = case
    folder, stem = exports[index], FILES[packing]
    assert [path.name for path in folder.glob("*.safetensors")] == [f"{stem}.safetensors"]
    version = 3 if case[:2] == ("bf16", "bitmask") else 2  # at 80 %, bits are smaller compressed
    said = {"quant_method": "pst_ds", "format": packing, "format_version": version, "values": values.values}
    said |= {"group": values.group or "row"}
    if embeddings:
        said |= {"embeddings": embeddings.values, "embedding_group": embeddings.group or "row"}
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == said | {"weights_file": f"{stem}.safetensors"}
    table = json.loads((folder / MANIFEST_FILE).read_text())
    assert table["format"] == 3
    entries, about = read_manifest(folder)
    assert {entry.values for entry in entries} == {"", values.values, *([embeddings.values] if embeddings else [])}
    weights = sum(entry.numel for entry in entries)
    assert about["bits_per_weight"] == pytest.approx(
        8 * sum(t.nbytes for t in _stored(folder).values()) / weights, 1e-3
    )
    rounded = [entry for entry in entries if entry.values]
    assert all(0 < entry.rounding_error < (0.02 if entry.values == "int8" else 0.2) for entry in rounded)
    assert about["largest_rounding_error"] == max(entry.rounding_error for entry in rounded)
    assert {entry.spec.dtype for entry in entries} == {torch.bfloat16 if CASES[index][0] == "bf16" else torch.float32}
    card = (folder / "README.md").read_text()
    assert f"They are quantised to {values.values}, with a bf16 scale per" in card
    assert "bits per weight" in card


@pytest.mark.parametrize(("index", "case"), enumerate(CASES), ids=str)
def test_loaded_with_transformers_it_is_the_rounded_model(exports, index, case):
    model = AutoModelForCausalLM.from_pretrained(exports[index])
    for module, (_, weight) in by_numpy(_stored(exports[index])).items():
        found = model.get_submodule(module).weight
        found = found.t() if case[0] == "gpt2" and "h." in module else found
        assert torch.equal(found, torch.from_numpy(weight).to(found.dtype))


@pytest.mark.parametrize("index", [0, 2, 4, 6])
def test_a_folder_on_its_grid_keeps_its_codes_in_every_packing(exports, tmp_path, index):
    name, packing, values, embeddings = CASES[index]
    first = by_numpy(_stored(exports[index]))
    for other in ("dense", "bitmask", packing):
        export_folder(
            exports[index], tmp_path / other.replace(":", ""), packing=other, values=values, embeddings=embeddings
        )
        again = _stored(tmp_path / other.replace(":", ""))
        assert by_numpy(again).keys() == first.keys()
        for module, (codes, weight) in by_numpy(again).items():
            assert np.array_equal(codes, first[module][0])
            assert np.array_equal(weight, first[module][1])
            assert torch.equal(again[f"{module}.scales"], _stored(exports[index])[f"{module}.scales"])
        check_export(tmp_path / other.replace(":", ""))
        said, before = (read_manifest(f)[1] for f in (tmp_path / other.replace(":", ""), exports[index]))
        assert said["largest_rounding_error"] == before["largest_rounding_error"]
        assert (said["step"], said["metrics"]) == (before["step"], before["metrics"])
    assert name


@pytest.mark.parametrize("index", range(len(CASES)))
def test_a_folder_of_codes_becomes_an_ordinary_model_and_others(exports, tmp_path, index):
    found = by_numpy(_stored(exports[index]))
    export_folder(exports[index], tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    plain = _stored(tmp_path / "plain")
    for module, (_, weight) in found.items():
        tensor = plain[f"{module}.weight"]
        matrix = tensor.t() if tuple(tensor.shape) != weight.shape or _is_conv1d(exports[index], module) else tensor
        assert torch.equal(matrix, torch.from_numpy(weight).to(tensor.dtype))
    check_export(tmp_path / "plain")
    export_folder(exports[index], tmp_path / "csr", packing="csr")
    check_export(tmp_path / "csr")
    export_folder(tmp_path / "csr", tmp_path / "again")
    assert all(torch.equal(tensor, plain[name]) for name, tensor in _stored(tmp_path / "again").items())


def _is_conv1d(folder, module):
    entries = {entry.name: entry for entry in read_manifest(folder)[0]}
    return entries[f"{module}.weight"].transposed


def test_exact_weights_come_back_in_fp32(models, tmp_path):
    """A bf16 model's codes stand for weights that bf16 does not hold; a cast shows them."""
    models["bf16"].export(tmp_path / "packed", packing="bitmask", values=INT8)
    export_folder(tmp_path / "packed", tmp_path / "fp32", dtype="fp32")
    for module, (_, weight) in by_numpy(_stored(tmp_path / "packed")).items():
        assert np.array_equal(_stored(tmp_path / "fp32")[f"{module}.weight"].double().numpy(), weight)


@pytest.mark.parametrize(("values", "embeddings"), [(None, INT4), (INT8, INT8)])
def test_another_folder_with_zeros_is_rounded(tmp_path, values, embeddings):
    """Its linear layers inside the blocks, and all that is packed; the pooler and the head stay."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, ::2] = 0.0
    model.save_pretrained(tmp_path / "model")
    said = export_folder(tmp_path / "model", tmp_path / "out", packing="bitmask", values=values, embeddings=embeddings)
    found = by_numpy(_stored(tmp_path / "out"))
    tables = {f"bert.embeddings.{name}_embeddings" for name in ("word", "position")}  # token_type has two rows
    blocks = {
        name.removesuffix(".weight") for name, p in model.named_parameters() if ".layer." in name and p.dim() == 2
    }
    assert found.keys() == tables | (blocks if values else set())
    assert said["packed_tensors"] == 1
    assert ("bert.encoder.layer.0.output.dense.bitmask" in _stored(tmp_path / "out")) is True
    for module, (_, weight) in found.items():
        grid = embeddings if module in tables else values
        expected = round_to_grid(model.get_parameter(f"{module}.weight").detach(), None, grid)
        assert np.array_equal(weight, expected.double().numpy())
    assert check_export(tmp_path / "out")["rounded_tensors"] == len(found)
    check_model(tmp_path / "out")


def test_a_tied_table_is_stored_once_and_an_output_layer_of_its_own_by_itself(exports, models, tmp_path):
    tied, apart = (_stored(exports[CASES.index(case)]) for case in (CASES[2], CASES[0]))
    assert "model.embed_tokens.codes" in tied
    assert not [name for name in tied if name.startswith("lm_head")]
    assert {"model.embed_tokens.codes", "lm_head.codes"} <= apart.keys()


@pytest.mark.parametrize(("grid", "part"), [(None, "compressed"), (INT8, "codes")])
def test_a_packed_output_layer_is_packed_with_fewer_rows(models, tmp_path, monkeypatch, grid, part):
    monkeypatch.setattr("pst_ds.writing.plan._MAX_DENSE_SHARE", 2.0)  # int4 made few weights zero
    tokenizer, source = models["llama"].tokenizer, tmp_path / "source"
    models["llama"].export(source, packing="bitmask", values=INT8, embeddings=INT4)
    settings = {"packing": "bitmask", "values": grid, "embeddings": grid}
    export_folder(source, tmp_path / "whole", **settings)
    vocabulary = trim(tokenizer, tokenizer("the film")["input_ids"])
    export_folder(source, tmp_path / "fewer", tokenizer=tokenizer, vocabulary=vocabulary, **settings)
    check_export(tmp_path / "fewer")
    assert {"lm_head.bitmask", f"lm_head.{part}"} <= _stored(tmp_path / "fewer").keys()
    whole, fewer = (AutoModelForCausalLM.from_pretrained(tmp_path / name).lm_head.weight for name in ("whole", "fewer"))
    assert torch.equal(fewer, whole[list(vocabulary.kept)])


def test_routers_of_experts_are_left_as_they_are(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=67, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    export_folder(tmp_path / "model", tmp_path / "out", values=INT8)
    rounded = by_numpy(_stored(tmp_path / "out"))
    assert any("q_proj" in name for name in rounded)
    assert any("experts.gate_up_proj" in name for name in rounded)
    assert not any(".gate." in name for name in rounded)
    assert any(name.endswith(".gate.weight") for name in _stored(tmp_path / "out"))


def test_tensors_do_not_depend_on_the_number_of_files(models, exports, tmp_path):
    how = {"packing": "bitmask", "values": INT4_32, "embeddings": INT4_32}
    models["bf16"].export(tmp_path / "sharded", shard_bytes=6000, **how)
    whole, sharded = _stored(exports[4]), _stored(tmp_path / "sharded")
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    check_export(tmp_path / "sharded")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(exports[4]).lm_head.weight)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"values": Grid(4, 64)}, r"model\.layers\.0\.\w+\.\w+_proj\.weight: groups of 64 do not divide (24|36)"),
        ({"embeddings": INT4_32}, "weight: groups of 32 do not divide 24 inputs; take row"),
        ({"packing": "csr", "values": INT8}, "csr holds values of the model's dtype only. For int8 and int4"),
        ({"packing": "csr", "embeddings": INT8}, "csr holds values of the model's dtype only"),
    ],
)  # fmt: skip
def test_what_cannot_be_rounded_is_refused_and_nothing_is_written(models, exports, tmp_path, how, message):
    with pytest.raises(ExportError, match=message):
        models["llama"].export(tmp_path / "out", **how)
    with pytest.raises(ExportError, match=message):
        export_folder(models["llama"].base, tmp_path / "out", **how)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused_midway_and_nothing_is_written(models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models["llama"].base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.inf
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: a weight of rows .* is not finite"):
        export_folder(tmp_path / "model", tmp_path / "out", values=INT8)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_damaged_codes_are_not_converted(exports, tmp_path):
    import shutil

    from safetensors.torch import save_file

    folder = Path(shutil.copytree(exports[2], tmp_path / "copy"))
    path, name = folder / "pst_2of4.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(path)
    tensors[f"{name}.codes"][0, 0] = 0x88
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"up_proj\.codes is not what was exported"):
        export_folder(folder, tmp_path / "out")
    with pytest.raises(ExportError, match=r"up_proj\.codes is not what was exported"):
        check_export(folder)
    (folder / MANIFEST_FILE).unlink()
    tensors[f"{name}.scales"][5] = 0.0
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"up_proj\.weight: scale 0 of row 5 is 0"):
        export_folder(folder, tmp_path / "out")
    del tensors[f"{name}.scales"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ExportError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.scales, a part of a weight packed as 2:4"
    ):
        export_folder(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_without_its_manifest_a_folder_is_read_by_its_config(exports, tmp_path):
    import shutil

    folder = Path(shutil.copytree(exports[4], tmp_path / "copy"))
    (folder / MANIFEST_FILE).unlink()
    export_folder(folder, tmp_path / "out")
    export_folder(exports[4], tmp_path / "expected")
    found, expected = _stored(tmp_path / "out"), _stored(tmp_path / "expected")
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    assert grid_of("int4", 32) == INT4_32


def test_the_program_in_the_documents_reads_a_layer(models, tmp_path):
    text = Path("docs/how-to/export.md").read_text(encoding="utf-8")
    (program,) = [block.partition("```")[0] for block in text.split("```python\n")[1:] if "halves" in block]
    models["bf16"].export(tmp_path, packing="bitmask", values=INT4_32)
    found: dict[str, np.ndarray] = {}
    exec(program.replace("small/pst_bitmask", f"{tmp_path}/pst_bitmask"), found)
    expected = by_numpy(_stored(tmp_path))["model.layers.0.mlp.up_proj"][1]
    assert np.array_equal(found["weight"], expected)
