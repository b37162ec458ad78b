"""Update forms of other packages, found by entry points: they train, save, resume and export without kernels."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from pst_ds.checkpoint.format import read_checkpoint
from pst_ds.cli.main import main
from pst_ds.config.pst import PSTConfig
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from tests.train.stopping import train_here
from tests.update_forms import install_forms

pytestmark = pytest.mark.usefixtures("alone")
FORMS = {"shift": "tests.update_forms:OutputShift", "dora": "tests.update_forms:DoRA"}
PARAMETERS = {
    "shift": {"shift", "t"},
    "dora": {"lora_A", "lora_B", "magnitude"},
    "spp": {"U", "V"},
    "learned-ranks": {"U", "V", "G"},
    "beside": {"U", "V"},
}


@pytest.fixture(autouse=True)
def plugins(tmp_path, monkeypatch):
    install_forms(tmp_path / "plugins", monkeypatch, **FORMS)


def _train(folder, form, *more, resume=False, stop_at=0, ranks=False):
    settings = [
        f"output_dir={json.dumps(str(folder))}", f"pst.update_form={form}", "train.num_steps=6",
        "schedule.update_interval=1", "checkpoint.interval=2", *more,
    ]  # fmt: skip
    return train_here("tests/data/world_size.toml", settings, resume=resume, stop_at=stop_at, ranks=ranks)


def _values(folder):
    """The trained tensors and the masks of the last checkpoint, whole."""
    checkpoint = read_checkpoint((Path(folder) / "checkpoints" / "final").resolve())
    return {**checkpoint.trained, **{f"mask {name}": bits for name, bits in checkpoint.masks.items()}}


def _export_exactly(run, out, form, verb):
    """Export ``run`` and compare the export with it, if a dense weight can hold the form's update."""
    if form == "beside":
        return
    verb("export", str(run), "--out", str(out))
    assert main(["verify", str(out), "--against", str(run)]) == 0


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
    _export_exactly(tmp_path / "whole", tmp_path / "exported", form, verb)


@pytest.mark.zero3
@pytest.mark.parametrize("form", PARAMETERS)
def test_two_ranks_train_as_one_does(form, run_ranks, tmp_path, verb):
    """Forms that are not exact in slices gather whole weights for masks."""
    one = partial(_train, str(tmp_path / "1"), form, ranks=True)
    two = partial(_train, str(tmp_path / "2"), form, ranks=True)
    run_ranks(one, 1)
    run_ranks(partial(two, stop_at=4), 2)
    run_ranks(partial(two, resume=True), 2)
    expected = _values(tmp_path / "1")
    values = _values(tmp_path / "2")
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("mask "):
            differing = sum(int(byte).bit_count() for byte in (value ^ values[name]).tolist())
            assert differing <= 2, name
        else:
            assert torch.allclose(values[name], value, atol=1e-3), name
    _export_exactly(tmp_path / "2", tmp_path / "exported", form, verb)


def test_inspect_shows_the_kept_ranks(tmp_path, verb):
    """A penalty of 40 cuts every term in six steps, one of 0 none."""
    for penalty, kept in ((40, 0), (0, 8)):
        folder = tmp_path / str(penalty)
        _train(folder, "learned-ranks", f"pst.update_penalty={penalty}", "train.update_learning_rate=0.01")
        layers = verb("inspect", str(folder))["layers"]
        ranks = {layer["update"]["kept rank"] for layer in layers if layer["pattern"]}
        assert ranks == {kept}


def test_a_form_s_rates_are_those_of_its_groups(tmp_path):
    _train(tmp_path / "run", "shift", "train.update_learning_rate=0.001")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if line["event"] == "step")
    assert step["lr/updates x 3"] == pytest.approx(3 * step["lr/updates"])


def test_the_default_rate_is_the_form_s(tmp_path):
    run = load_run("tests/data/world_size.toml", [f"output_dir={tmp_path}"])
    sizes = {"width": 384, "num_steps": 600, "num_examples": 9600, "num_labels": 2}
    default = run.with_rates(**sizes).train.update_learning_rate
    spp = replace(run, pst=replace(run.pst, update_form="spp")).with_rates(**sizes)
    assert spp.train.update_learning_rate == pytest.approx(15 * default)


def test_a_weight_cannot_hold_the_update_beside_the_mask(tmp_path, capsys):
    _train(tmp_path / "run", "beside")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "exported")]) == 2
    assert "adds U V to every weight, which leaves no zeros" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"update_form = 'sp' is not the name of a known update form. Did you mean"):
        load_run("tests/data/world_size.toml", [f"output_dir={tmp_path}", "pst.update_form=sp"])


def test_forms_do_not_train_the_weights_themselves():
    with pytest.raises(ConfigError, match="updates frozen weights, and train_weights = true trains them"):
        PSTConfig(update_form="spp", train_weights=True)


def test_the_form_of_the_documentation_trains_and_exports_exactly(tmp_path, monkeypatch, verb):
    page = Path("docs/background/architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Add an update form")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    ((name, module, form),) = re.findall(r'^([\w-]+) = "(my_package\.\w+):(\w+)"$', section, flags=re.M)
    file = tmp_path / "site" / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(parents=True)
    file.write_text(code, encoding="utf-8")
    install_forms(tmp_path / "site", monkeypatch, **{name: f"{module}:{form}"})
    assert f'update_form = "{name}"' in section
    _train(tmp_path / "run", name)
    assert any(key.endswith(".pst_s") for key in _values(tmp_path / "run"))
    verb("export", str(tmp_path / "run"), "--out", str(tmp_path / "exported"))
    assert main(["verify", str(tmp_path / "exported"), "--against", str(tmp_path / "run")]) == 0
