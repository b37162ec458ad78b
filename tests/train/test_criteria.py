"""``pst.criterion``: runs rank by a criterion of pst-ds, or of an installed package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.config import criteria
from pst_ds.config.pst import PSTConfig
from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import launch_environment
from pst_ds.plugins import Registry
from pst_ds.train.run import prepare, train_prepared
from tests.plugins import install

RUN_FILE = "tests/data/world_size.toml"
PLUGIN = """
from pst_ds import Criterion


class RootNorms(Criterion):
    needs = frozenset({"input_norms"})

    def scores(self, part):
        return part.base.float().abs() * part.input_norms.sqrt()


class WeightTimesGradient(Criterion):
    needs = frozenset({"gradients"})

    def scores(self, part):
        return (part.weight * part.gradient).abs()
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Two criteria of another package."""
    folder = tmp_path / "package"
    group = "pst_ds.criteria"
    entries = {"root-norms": "rankings:RootNorms", "gradient": "rankings:WeightTimesGradient"}
    install(folder, group, **entries)
    (folder / "rankings.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(criteria, "CRITERIA", Registry(group, "criterion", criteria.CRITERIA._builtin))


def _train(output_dir, *overrides):
    run = load_run(RUN_FILE, [f"output_dir={output_dir}", "train.num_steps=8", *overrides])
    result = train_prepared(prepare(run, launch_environment()), quiet=True)
    return result["trained_parameters"]


def _masks(folder):
    """The checksums of all mask updates, and the masks of the last checkpoint."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    sums = [line["mask_checksum"] for line in lines if line["event"] == "mask_update"]
    return sums, dict(read_checkpoint(Path(folder) / "checkpoints" / "final").masks)


@pytest.mark.zero3
def test_a_criterion_of_another_package_prunes_alike_on_one_and_two_ranks(run_ranks, plugin, tmp_path):
    """It ranks by W0 and norms of inputs, which training does not change, so all masks are equal bit for bit."""
    setting = 'pst.criterion="root-norms"'
    run_ranks(_train, 2, str(tmp_path / "two"), setting)
    run_ranks(_train, 1, str(tmp_path / "one"), setting, "deepspeed_config=")
    run_ranks(_train, 1, str(tmp_path / "default"), "deepspeed_config=")
    sums, masks = _masks(tmp_path / "one")
    sums_of_two, masks_of_two = _masks(tmp_path / "two")
    assert sums == sums_of_two
    assert len(set(sums)) > 2
    assert masks.keys() == masks_of_two.keys()
    for name, bits in masks.items():
        assert torch.equal(torch.as_tensor(bits), torch.as_tensor(masks_of_two[name])), name
    assert set(sums).isdisjoint(_masks(tmp_path / "default")[0])


@pytest.mark.zero3
def test_a_run_ranks_by_gradients_without_factors_of_scores(run_ranks, plugin, tmp_path):
    (trained,) = run_ranks(_train, 1, str(tmp_path / "one"), 'pst.criterion="gradient"', "deepspeed_config=")
    (default,) = run_ranks(_train, 1, str(tmp_path / "default"), "deepspeed_config=")
    assert trained < default
    sums = _masks(tmp_path / "one")[0]
    assert len(set(sums)) > 2
    assert set(sums).isdisjoint(_masks(tmp_path / "default")[0])


@pytest.mark.zero3
def test_the_criterion_that_settings_imply_has_the_same_masks_by_name(run_ranks, tmp_path):
    for name in ("", "learned"):
        run_ranks(_train, 1, str(tmp_path / f"run-{name}"), f'pst.criterion="{name}"', "deepspeed_config=")
    assert _masks(tmp_path / "run-")[0] == _masks(tmp_path / "run-learned")[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"criterion": "lerned"},
            r"criterion: 'lerned' is not the name of a known criterion. Did you mean 'learned'\?",
        ),
        ({"criterion": "learned", "magnitude": "activation"}, 'criterion = "learned" does not use norms of inputs'),
        (
            {"criterion": "learned", "score_rank": 0, "structured_scores": False},
            "uses learned scores, which score_rank",
        ),
        ({"criterion": "magnitude", "initial_mask": "zeros"}, 'and initial_mask = "zeros" keeps the non-zeros'),
    ],
)
def test_settings_that_do_not_fit_a_criterion_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PSTConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=lora"], "pst.criterion = \"magnitude\" ranks weights, and method = 'lora' prunes none"),
        (["method=experts"], "removes whole experts, and pst.criterion is about single weights"),
        (["schedule.solves=1"], 'ranks by ALPS, not by pst.criterion = "magnitude"'),
    ],
)
def test_methods_that_rank_no_weights_refuse_a_criterion(settings, message):
    with pytest.raises(ValueError, match=message):
        load_run(RUN_FILE, ['pst.criterion="magnitude"', *settings])


def test_a_mask_that_is_chosen_before_the_first_step_cannot_have_gradients(plugin):
    with pytest.raises(
        ValueError, match="needs gradients, and method = 'masked-lora' chooses its mask before the firs"
    ):
        load_run(RUN_FILE, ['pst.criterion="gradient"', "method=masked-lora"])
