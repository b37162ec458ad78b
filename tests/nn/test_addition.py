"""Additions of other packages, found by entry points: they train on any number of ranks, resume and export."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.additions import ADDITIONS, AdditionSettings
from pst_ds.errors import InputError
from pst_ds.nn.addition import AddedModule, ModelAddition, attach_additions
from pst_ds.nn.optimizer import pst_parameter_groups
from tests.plugins import install
from tests.train.stopping import train_here

PAGE = "docs/background/architecture.md"
NAME = "embedding-shift"
BERT = "tests/data/tiny-bert"


class Misplaced(ModelAddition):
    """An addition that does not use its name in the model."""

    def attach(self, model, tokenizer, seed):
        module = AddedModule()
        module.weight = nn.Parameter(torch.zeros(2))
        model.add_module("other", module)
        return module

    def restore(self, model, facts, tensors):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def plugins(tmp_path, monkeypatch):
    """Install the example of the page, and a wrong one, as the package of another author."""
    section = Path(PAGE).read_text(encoding="utf-8").partition("## Add a trained module")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    ((name, module, kind),) = re.findall(r'^([\w-]+) = "(my_package\.\w+):(\w+)"$', section, flags=re.MULTILINE)
    assert name == NAME
    assert f"[additions.{NAME}]" in section
    site = tmp_path / "site"
    file = site / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(parents=True)
    file.write_text(code, encoding="utf-8")
    values = {NAME: f"{module}:{kind}", "misplaced": f"{__name__}:Misplaced"}
    monkeypatch.syspath_prepend(install(site, "pst_ds.additions", **values))
    monkeypatch.setitem(vars(ADDITIONS), "_entries", type(ADDITIONS)._entries.func(ADDITIONS))


def _train(folder, *, resume=False, stop_at=0, ranks=False):
    settings = [
        f"output_dir={json.dumps(str(folder))}",
        f"additions.{NAME}.learning_rate=0.01",
        "schedule.final_sparsity=0.5",
        "train.num_steps=4",
        "checkpoint.interval=2",
        "eval.interval=0",
    ]
    return train_here("tests/data/world_size.toml", settings, resume=resume, stop_at=stop_at, ranks=ranks)


def _trained(folder):
    return dict(read_checkpoint((Path(folder) / "checkpoints" / "final").resolve()).trained)


def test_the_example_trains_resumes_and_exports_exactly(tmp_path, verb):
    _train(tmp_path / "whole")
    _train(tmp_path / "stopped", stop_at=3)
    _train(tmp_path / "stopped", resume=True)
    whole = _trained(tmp_path / "whole")
    stopped = _trained(tmp_path / "stopped")
    assert whole["bert.pst_embedding_shift.vector"].any()
    for name, values in whole.items():
        assert torch.equal(values, stopped[name]), name
    verb("export", str(tmp_path / "whole"), "--out", str(tmp_path / "out"))
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "whole")]) == 0


@pytest.mark.zero3
def test_two_ranks_train_the_example_as_one_does(run_ranks, tmp_path):
    run_ranks(partial(_train, str(tmp_path / "2"), ranks=True), 2)
    _train(tmp_path / "1")
    name = "bert.pst_embedding_shift.vector"
    torch.testing.assert_close(_trained(tmp_path / "2")[name], _trained(tmp_path / "1")[name], atol=1e-4, rtol=1e-3)


def test_a_script_trains_it_in_a_group_of_its_own():
    model = AutoModelForSequenceClassification.from_pretrained(BERT).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(BERT)
    attach_additions(model, {NAME: AdditionSettings(learning_rate=0.02)}, tokenizer, seed=0)
    (group,) = pst_parameter_groups(model)
    assert group["name"] == f"additions.{NAME}"
    assert group["lr"] == 0.02


def test_a_module_under_another_name_is_refused():
    model = AutoModelForSequenceClassification.from_pretrained(BERT)
    with pytest.raises(InputError, match="must put its module into the model under the name 'pst_misplaced'"):
        attach_additions(model, {"misplaced": AdditionSettings()}, AutoTokenizer.from_pretrained(BERT), seed=0)
