"""A tiny run and what is made of it, for the tests that look at folders and not at training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from pst_ds.cli.main import main
from tests.prune.conftest import tiny  # noqa: F401  # a fixture

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A Llama's run of 6 steps, its exports (dense and bitmask), its base model pruned by magnitude; a regressor."""
    top = tmp_path_factory.mktemp("folders")
    settings = {
        "output_dir": str(top / "run"), "deepspeed_config": "", "train.num_steps": 6, "schedule.update_interval": 1,
        "schedule.final_sparsity": 0.6, "pst.update_init": "lora", "checkpoint.interval": 4,
    }  # fmt: skip
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in LAUNCHER:
            patch.delenv(name, raising=False)
        run_file = "tests/data/causal_lm.toml"
        assert main(["train", run_file, "--quiet", *overrides]) == 0
        assert main(["export", str(top / "run"), "--out", str(top / "dense")]) == 0
        assert main(["export", str(top / "run"), "--format", "bitmask", "--out", str(top / "bitmask")]) == 0
        prune = ["prune", run_file, "--method", "magnitude", "--sparsity", "0.5", "--out", str(top / "pruned")]
        assert main(prune) == 0
        model = transformers.AutoModelForSequenceClassification.from_pretrained("tests/data/tiny-bert", num_labels=1)
        model.save_pretrained(top / "regressor")
        transformers.AutoTokenizer.from_pretrained("tests/data/tiny-bert").save_pretrained(top / "regressor")
    return top


@pytest.fixture
def copied(folders, tmp_path):
    """``copied(name)``: a copy of one of the folders, to damage."""
    return lambda name: Path(shutil.copytree(folders / name, tmp_path / name, symlinks=True))
