"""Exports for compressed-tensors: the codes of a dense export, in that library's names and words."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pst_ds.core.quantization import Grid
from pst_ds.writing.check import check_export, check_model
from pst_ds.writing.encoding import ExportError
from pst_ds.writing.manifest import read_manifest
from tests.exporting import export_folder
from tests.formats.test_compressed_tensors import by_numpy
from tests.writing.test_quantization import by_numpy as of_ours

CASES = [("llama", Grid(8)), ("2:4", Grid(4)), ("bf16", Grid(4, 32))]
W8A8 = "compressed-tensors-w8a8"


@pytest.fixture(scope="module", params=CASES, ids=str)
def folders(request, models, tmp_path_factory):
    """(grid, folder for compressed-tensors, dense folder of ours)."""
    name, grid = request.param
    top = tmp_path_factory.mktemp("exports")
    models[name].export(top / "theirs", packing="compressed-tensors", values=grid)
    models[name].export(top / "ours", packing="dense", values=grid)
    return grid, top / "theirs", top / "ours"


def test_codes_and_scales_are_those_of_a_dense_export(folders):
    grid, theirs, ours = folders
    assert [path.name for path in theirs.glob("*.safetensors")] == ["model.safetensors"]
    tensors, known = load_file(theirs / "model.safetensors"), load_file(ours / "pst_dense.safetensors")
    expected = of_ours(known)
    packed = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    assert packed == set(expected)
    for module in packed:
        parts = {part: tensors[f"{module}.{part}"] for part in ("weight_packed", "weight_scale", "weight_shape")}
        assert np.array_equal(by_numpy(parts, grid.bits), expected[module][0])
        assert torch.equal(parts["weight_scale"], known[f"{module}.scales"])
    said = check_export(theirs)
    check_model(theirs)
    assert (said["kind"], said["packed_tensors"]) == ("compressed-tensors", len(packed))


def test_the_config_is_the_library_s(folders):
    grid, theirs, _ = folders
    table = json.loads((theirs / "config.json").read_text())["quantization_config"]
    assert (table["quant_method"], table["format"]) == ("compressed-tensors", "pack-quantized")
    (group,) = table["config_groups"].values()
    assert (group["targets"], group["input_activations"]) == (["Linear"], None)
    weights = group["weights"]
    assert (weights["num_bits"], weights["type"], weights["symmetric"]) == (grid.bits, "int", True)
    assert (weights["strategy"], weights["group_size"]) == (("group", 32) if grid.group else ("channel", None))
    assert table["ignore"] == ["lm_head"] == read_manifest(theirs)[1]["left_alone"]
    assert "Requires the package compressed-tensors" in (theirs / "README.md").read_text()


def test_transformers_computes_with_it(folders):
    pytest.importorskip("compressed_tensors")
    import pst_ds.hf  # noqa: F401 (for the folder of ours)

    _, theirs, ours = folders
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        found, expected = (AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)


def test_a_folder_becomes_one(models, tmp_path):
    models["llama"].export(tmp_path / "dense")
    models["llama"].export(tmp_path / "expected", packing="compressed-tensors", values=Grid(8))
    export_folder(tmp_path / "dense", tmp_path / "out", packing="compressed-tensors", values=Grid(8))
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture(scope="module")
def with_inputs_of_8_bits(models, tmp_path_factory):
    """(folder for compressed-tensors whose inputs are rounded too, dense folder of ours)."""
    top = tmp_path_factory.mktemp("exports")
    models["llama"].export(top / "theirs", packing=W8A8, values=Grid(8))
    models["llama"].export(top / "ours", packing="dense", values=Grid(8))
    return top / "theirs", top / "ours"


def test_inputs_of_8_bits_go_with_the_codes_as_they_are(with_inputs_of_8_bits):
    theirs, ours = with_inputs_of_8_bits
    tensors, known = load_file(theirs / "model.safetensors"), load_file(ours / "pst_dense.safetensors")
    packed = {name.removesuffix(".codes") for name in known if name.endswith(".codes")}
    for module in packed:
        assert torch.equal(tensors[f"{module}.weight"], known[f"{module}.codes"])
        assert torch.equal(tensors[f"{module}.weight_scale"], known[f"{module}.scales"])
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.int8} == {f"{m}.weight" for m in packed}
    said = check_export(theirs)
    check_model(theirs)
    assert (said["kind"], said["packed_tensors"]) == (W8A8, len(packed))
    table = json.loads((theirs / "config.json").read_text())["quantization_config"]
    assert table["format"] == "int-quantized"
    (group,) = table["config_groups"].values()
    inputs = group["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"]) == (8, "token", True)
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (8, "channel")


def test_transformers_rounds_inputs_of_8_bits(with_inputs_of_8_bits):
    pytest.importorskip("compressed_tensors")
    import pst_ds.hf  # noqa: F401 (for the folder of ours)

    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        found, expected = (AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in with_inputs_of_8_bits)
    apart = (found - expected).norm() / expected.norm()
    assert 1e-4 < apart < 0.05


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("llama", {}, 'format = "compressed-tensors" holds int8 or int4 linear layers only. Set values = "int8" or'),
        ("llama", {"values": Grid(8), "embeddings": Grid(8)}, "linear layers only"),
        ("gpt2", {"values": Grid(8)}, r"is the weight of a Conv1D, and compressed-tensors supports nn\.Linear only"),
    ],
)
def test_what_it_cannot_hold_is_refused_and_nothing_is_written(models, tmp_path, name, how, message):
    with pytest.raises(ExportError, match=message):
        models[name].export(tmp_path / "out", packing="compressed-tensors", **how)
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_converted(folders, tmp_path):
    with pytest.raises(ExportError, match=r"is quantised \(compressed-tensors\)\. Export the model before"):
        export_folder(folders[1], tmp_path / "out")
