"""Update forms of other packages, found by entry points: they train, save, resume and export without kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.toml import load_run
from pst_ds.parallel.launch import LaunchEnvironment
from pst_ds.parallel.ranks import rank, world_size
from pst_ds.train.run import prepare, train_prepared
from tests.train.stopping import stopping
from tests.update_forms import install_forms

pytestmark = pytest.mark.usefixtures("alone")
FORMS = {"shift": "tests.update_forms:OutputShift", "dora": "tests.update_forms:DoRA"}
PARAMETERS = {"shift": {"shift", "t"}, "dora": {"lora_A", "lora_B", "magnitude"}, "spp": {"U", "V"}}


@pytest.fixture(autouse=True)
def plugins(tmp_path, monkeypatch):
    install_forms(tmp_path / "plugins", monkeypatch, **FORMS)


def _train(folder, form, *more, resume=False, stop_at=0):
    settings = [
        f"output_dir={json.dumps(str(folder))}", "deepspeed_config=", f"pst.update_form={form}", "train.num_steps=6",
        "schedule.update_interval=1", "checkpoint.interval=2", *more,
    ]  # fmt: skip
    run = load_run("tests/data/world_size.toml", settings)
    prepared = prepare(run, LaunchEnvironment(rank(), world_size(), rank()))
    if not stop_at:
        return train_prepared(prepared, resume=resume, quiet=True)
    with stopping(stop_at):
        train_prepared(prepared, resume=resume, quiet=True)


def _values(folder):
    """The trained tensors and the masks of the last checkpoint, whole."""
    checkpoint = read_checkpoint((Path(folder) / "checkpoints" / "final").resolve())
    return {**checkpoint.trained, **{f"mask {name}": bits for name, bits in checkpoint.masks.items()}}


@pytest.mark.parametrize("form", PARAMETERS)
def test_a_form_trains_resumes_and_exports_exactly(form, tmp_path, verb):
    _train(tmp_path / "whole", form)
    _train(tmp_path / "stopped", form, stop_at=4)
    _train(tmp_path / "stopped", form, resume=True)
    whole = _values(tmp_path / "whole")
    stopped = _values(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    for name, values in whole.items():
        assert torch.equal(values, stopped[name]), name
    endings = {name.rpartition(".pst_")[2] for name in whole if ".pst_" in name and "embeddings" not in name}
    assert endings == PARAMETERS[form] | {"A", "B", "R", "C"}
    exported = tmp_path / "exported"
    verb("export", str(tmp_path / "whole"), "--out", str(exported))
    assert main(["verify", str(exported), "--against", str(tmp_path / "whole")]) == 0
