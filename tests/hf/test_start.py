"""One-shot pruning in scripts, before the model is loaded."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pst_ds import PruneConfig, PSTConfig, prune_pretrained
from pst_ds.errors import InputError

ZEROS = PSTConfig(initial_mask="zeros", pattern="row")


def _batches(data, size=8):
    names = [name for name in data[0] if name != "labels"]
    rows = [{name: torch.tensor(row[name]) for name in names} for row in data]
    return [
        {name: torch.stack([row[name] for row in rows[at : at + size]]) for name in names} | {"labels": None}
        for at in range(0, len(rows), size)
    ]


@pytest.mark.usefixtures("alone")
def test_a_script_gets_the_same_folder_once(base, data, tmp_path):
    config = PruneConfig(method="alps", samples=16, sparsity=0.5)
    batches = _batches(data[:24])
    out = prune_pretrained(base, tmp_path / "one", batches, config, pst=ZEROS, precision="fp32")
    made = out.stat().st_mtime_ns
    assert prune_pretrained(base, tmp_path / "one", batches, config, pst=ZEROS, precision="fp32") == out
    assert out.stat().st_mtime_ns == made
    two = prune_pretrained(base, tmp_path / "two", _batches(data[:16]), config, pst=ZEROS, precision="fp32")
    weights, others = load_file(out / "model.safetensors"), load_file(two / "model.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    prune_pretrained(base, tmp_path / "one", batches, config, pst=ZEROS, precision="bf16")
    assert out.stat().st_mtime_ns != made


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        ([], {"sparsity": 0.5}, "batches is empty"),
        ([{"labels": torch.zeros(2)}], {"sparsity": 0.5}, "no tensors besides labels, but labels"),
        ([], {}, "PruneConfig has no sparsity"),
    ],
)
def test_calls_without_what_they_need_are_refused(base, tmp_path, batches, settings, message):
    with pytest.raises(InputError, match=message):
        prune_pretrained(base, tmp_path / "out", batches, PruneConfig(method="alps", **settings))
    assert not (tmp_path / "out").exists()
