"""A storage format of another package, as docs/background/architecture.md has it: one file, and no change of pst_ds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pst_ds.cli.main import main
from pst_ds.errors import InputError
from pst_ds.export.export_run import ExportSettings
from pst_ds.export.verify import verify
from pst_ds.formats import FormatError
from pst_ds.formats.safetensors_file import TensorFile
from pst_ds.hf import PackedWeightsConfig
from pst_ds.runtime import sparse_layers
from pst_ds.storage_format import STORAGE_FORMATS, listed_formats, storage_format
from tests.plugins import install
from tests.writing.conftest import tiny_llama

GROUP = "pst_ds.storage_formats"
PAGE = Path(__file__).resolve().parents[1] / "docs/background/architecture.md"
(CODE,) = re.findall(r'```python\n("""Storage format "coo".*?)```', PAGE.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture
def coo(tmp_path, monkeypatch):
    """The format of the page, installed for one test."""
    folder = install(tmp_path / "site", GROUP, coo="coo_of_page:Coo")
    (folder / "coo_of_page.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    vars(STORAGE_FORMATS).pop("_entries", None)
    yield
    vars(STORAGE_FORMATS).pop("_entries", None)
    sys.modules.pop("coo_of_page", None)


@pytest.fixture
def pruned(tmp_path):
    """A model folder with 95 % sparsity inside the blocks, and its weights by name."""
    torch.manual_seed(0)
    model = tiny_llama(hidden=64)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".layers." in name and weight.dim() == 2:
                cut = weight.abs().flatten().kthvalue(int(0.95 * weight.numel())).values
                weight[weight.abs() <= cut] = 0.0
    model.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned", model


@pytest.mark.filterwarnings("ignore:the storage format 'broken'")
def test_a_format_that_cannot_be_imported_prevents_only_work_with_it(coo, pruned, tmp_path, verb):
    source, _ = pruned
    (entry_points,) = (tmp_path / "site").glob("*/entry_points.txt")
    entry_points.write_text(entry_points.read_text(encoding="utf-8") + "broken = no_such_module:Broken\n", "utf-8")
    out = tmp_path / "packed"
    verb("export", str(source), "--format", "coo", "--out", str(out))
    assert verb("verify", str(out))["kind"] == "coo"
    assert main(["inspect", str(out)]) == 0
    with pytest.raises(InputError, match=r"'broken' \(no_such_module:Broken\) cannot be imported"):
        storage_format("broken")


def test_a_format_of_another_package_is_written_verified_inspected_and_loaded(coo, pruned, tmp_path, verb):
    source, model = pruned
    out = tmp_path / "packed"
    assert list(listed_formats())[-1] == "coo"
    report = verb("export", str(source), "--format", "coo", "--out", str(out))
    assert (report["kind"], report["packed_tensors"]) == ("coo", 14)
    assert "model.layers.0.mlp.up_proj.places" in TensorFile(out / "pst_coo.safetensors").slots
    assert verb("verify", str(out))["kind"] == "coo"
    inspected = verb("inspect", str(out))
    assert inspected["format"] == "coo"
    assert sum(layer["packing"] == "coo" for layer in inspected["layers"]) == 14
    ids = torch.arange(12).view(1, -1)
    for load_as in ("dense", "sparse"):
        loaded = AutoModelForCausalLM.from_pretrained(out, quantization_config=PackedWeightsConfig(load_as=load_as))
        layers = sparse_layers(loaded)
        assert len(layers) == (14 if load_as == "sparse" else 0)
        for name, weight in model.named_parameters():
            module = name.removesuffix(".weight")
            stored = layers[module].dense_weight() if module in layers else loaded.get_parameter(name)
            assert torch.equal(stored, weight)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    again = verb("export", str(out), "--format", "bitmask", "--out", str(tmp_path / "bits"))
    assert again["packed_tensors"] == 14


def test_damaged_parts_of_a_format_of_another_package_are_refused(coo, pruned, tmp_path, verb):
    out = tmp_path / "packed"
    verb("export", str(pruned[0]), "--format", "coo", "--out", str(out))
    tensors = load_file(out / "pst_coo.safetensors")
    tensors["model.layers.0.mlp.up_proj.places"][0] = -1
    save_file(tensors, out / "pst_coo.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj.places is not what was exported"):
        verify(out)
    with pytest.raises(FormatError, match="places must increase, and lie inside the matrix"):
        AutoModelForCausalLM.from_pretrained(out, quantization_config=PackedWeightsConfig(load_as="dense"))


def test_without_its_package_a_folder_is_refused_with_the_known_formats(coo, pruned, tmp_path, verb, monkeypatch):
    out = tmp_path / "packed"
    verb("export", str(pruned[0]), "--format", "coo", "--out", str(out))
    monkeypatch.undo()  # as if the package was uninstalled
    vars(STORAGE_FORMATS).pop("_entries")
    with pytest.raises(InputError, match="kind = 'coo': Input should be 'dense' or 'bitmask' or"):
        verify(out)
    with pytest.raises(InputError, match="format must be one of dense, bitmask, 2:4, csr, got 'coo'"):
        AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(InputError, match=r"format = 'coo' must be one of 'dense', 'bitmask', '2:4', 'csr', .*'onnx'"):
        ExportSettings(format="coo")
