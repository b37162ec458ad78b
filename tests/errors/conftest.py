"""The good folders that wrong inputs are made from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pst_ds.cli.main import main

from .workshop import Workshop

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Runs of four steps: "run" and "dense", its export, of the classifier; "causal" and "bitmask" of the language
    model. "pruned" is the BERT pruned by magnitude; "plain" a folder that is nothing."""
    top = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in LAUNCHER:
            patch.delenv(name, raising=False)
        make_good_folders(top)
    return top


def make_good_folders(top: Path) -> None:
    shop = Workshop(top, top)
    for name, train in (("run", shop.train), ("causal", shop.causal)):
        assert main([*train(f"output_dir={top}/{name}", "checkpoint.interval=2"), "--quiet"]) == 0
    assert main(["export", f"{top}/run", "--out", f"{top}/dense"]) == 0
    assert main(["export", f"{top}/causal", "--out", f"{top}/causal-dense"]) == 0
    assert main(["export", f"{top}/causal", "--format", "bitmask", "--out", f"{top}/bitmask"]) == 0
    shop.rows("numbers.jsonl", *({"text": "the film", "label": i / 10} for i in range(40)))
    (top / "plain").mkdir()
    (top / "plain" / "notes.md").write_text("nothing of a model\n")
