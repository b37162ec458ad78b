"""tools/masks_to_2of4.py and masks_to_csr.py: what ``pst-ds export`` writes, from a job script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pst_ds.cli.main import main as pst_ds
from tools import masks_to_2of4, masks_to_csr

ROOT = Path(__file__).resolve().parents[2]
FORMAT_OF = {masks_to_2of4: "2:4", masks_to_csr: "csr"}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A 2:4 model that transformers saved, of 62 % zeros so that csr is smaller too."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                groups = module.weight.view(-1, 4)
                groups.scatter_(1, torch.rand(groups.shape).argsort(1)[:, :2], 0.0)
                groups[::4] = 0.0
    folder = tmp_path_factory.mktemp("pruned")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained("tests/data/tiny-llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tool", FORMAT_OF)
def test_it_writes_what_export_does_and_dense_again_has_the_same_bits(pruned, tmp_path, capsys, tool):
    out = tmp_path / "tool"
    assert tool.main([str(pruned), str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["kind"], said["packed_tensors"], said["stay_dense"]) == (FORMAT_OF[tool], 14, [])
    assert pst_ds(["export", str(pruned), "--format", FORMAT_OF[tool], "--out", str(tmp_path / "verb" / "tool")]) == 0
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "verb" / "tool" / path.name).read_bytes(), path.name
    assert pst_ds(["verify", str(out)]) == 0
    assert pst_ds(["export", str(out), "--format", "dense", "--out", str(tmp_path / "dense")]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (pruned, tmp_path / "dense"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(torch.int16), after[n].view(torch.int16)) for n in before)


def test_it_runs_by_itself_and_refuses_what_is_not_there(pruned, tmp_path):
    tool = [sys.executable, "tools/masks_to_csr.py"]
    run = {"capture_output": True, "text": True, "timeout": 120, "check": False, "cwd": ROOT}
    done = subprocess.run([*tool, str(pruned), str(tmp_path / "out"), "--json"], **run)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["packed_tensors"] == 14
    done = subprocess.run([*tool, "no/such", str(tmp_path / "other")], **run)
    assert (done.returncode, done.stdout) == (2, "")
    assert "'no/such' does not exist" in done.stderr


@pytest.mark.parametrize("tool", FORMAT_OF)
def test_it_explains_itself(tool, capsys):
    with pytest.raises(SystemExit) as caught:
        tool.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"packed format {FORMAT_OF[tool]}" in text
    assert "SRC OUT" in text
