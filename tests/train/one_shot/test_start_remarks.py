"""What is said of a pruned base model whose zeros the run's pattern does not keep."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import launch_environment
from pst_ds.train.one_shot.start import remark_on_shares
from pst_ds.train.run import prepare, train_prepared

pytestmark = pytest.mark.usefixtures("alone")


def _run(folder, pattern, method="pst", **more):
    settings = {"model.path": str(folder), "pst.pattern": pattern, "method": method, "deepspeed_config": ""} | more
    return load_run("tests/data/world_size.toml", [f"{key}={json.dumps(value)}" for key, value in settings.items()])


@pytest.mark.parametrize(
    ("pattern", "budgets", "trained", "kept"),
    [
        ("row", None, "row", True),
        ("row", None, "matrix", True),
        ("2:4", None, "matrix", True),
        ("matrix", None, "row", False),
        ("matrix", "saliency", "matrix", False),
        ("row", "saliency", "row", False),
        ("matrix", "saliency", "global", True),
    ],
)
def test_a_pattern_that_shares_zeros_out_anew_is_named(tmp_path, pattern, budgets, trained, kept):
    record = {"pattern": pattern} | ({"budgets": budgets} if budgets else {})
    (tmp_path / "pruning.json").write_text(json.dumps(record))
    said = remark_on_shares(_run(tmp_path, trained))
    assert (said == "") == kept
    if not kept:
        assert f'pattern "{pattern}"' in said
        assert f'pst.pattern = "{trained}"' in said


def test_fixed_masks_models_that_were_not_pruned_and_damaged_records_say_nothing(tmp_path):
    assert remark_on_shares(_run(tmp_path, "row")) == ""
    (tmp_path / "pruning.json").write_text('{"pattern": "matrix", "budgets": "saliency"}')
    assert remark_on_shares(_run(tmp_path, "matrix", "masked-lora")) == ""
    (tmp_path / "pruning.json").write_text("[]")
    assert remark_on_shares(_run(tmp_path, "row")) == ""


@pytest.mark.parametrize(("pattern", "kept"), [("global", True), ("matrix", False)])
def test_global_begins_with_zeros_that_matrices_have_unequal_shares_of(tmp_path, pattern, kept):
    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree("tests/data/tiny-bert", start)
    weights = load_file(start / "model.safetensors")
    pruned = [n for n, w in weights.items() if ".encoder." in f".{n}" and n.endswith("weight") and w.dim() == 2]
    for i, name in enumerate(pruned):
        cut = weights[name].abs().flatten().kthvalue(int((0.3, 0.7)[i % 2] * weights[name].numel())).values
        weights[name] = weights[name].where(weights[name].abs() > cut, 0.0)
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    zeros = sum(int((weights[n] == 0).sum()) for n in pruned) / sum(weights[n].numel() for n in pruned)
    schedule = {f"schedule.{name}_sparsity": zeros for name in ("initial", "final")}
    schedule |= {"schedule.warmup_fraction": 0.0, "schedule.cooldown_fraction": 0.0}
    more = {"pst.frozen_magnitude": True, "train.num_steps": 1, "output_dir": str(tmp_path / "run")}
    train_prepared(prepare(_run(start, pattern, **schedule, **more), launch_environment()), quiet=True)
    assert main(["export", str(tmp_path / "run"), "--format", "dense", "--out", str(out)]) == 0
    exported = load_file(out / "model.safetensors")
    moved = sum(int(((weights[n] == 0) != (exported[f"bert.{n}"] == 0)).sum()) for n in pruned)
    assert (moved < len(pruned)) == kept  # the model's count is rounded
