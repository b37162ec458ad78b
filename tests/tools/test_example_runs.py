"""The example run files: their commands parse, and on tiny models each is planned, trained and exported as it says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from pst_ds.cli.main import main
from pst_ds.config.toml import load_run

from ..docs.test_commands import PARSERS

EXAMPLES = sorted(Path("tools/examples").glob("*.toml"))
DATA = Path("tests/data").resolve()
BERT, LLAMA = {"model.path": f"{DATA}/tiny-bert"}, {"model.path": f"{DATA}/tiny-llama"}
TEXTS = {f"data.{split}": f"{DATA}/{file}.jsonl" for split, file in
         (("train", "train"), ("validation", "validation"), ("test", "validation"))}  # fmt: skip
TEACHER = {"distillation.teacher": f"{DATA}/tiny-llama"}
TINY = {
    "encoder_90": BERT | TEXTS | {"data.max_length": 32},
    "causal_50": TEXTS | TEACHER | {"data.max_length": 32},
    "causal_2of4": TEXTS | TEACHER | {"data.max_length": 32},
    "glue_pairs": BERT | {"data.max_length": 32},
    "slurm_sweep": LLAMA | TEXTS | {"data.max_length": 32, "train.batch_size": 8},
}
"""What each needs to train here: a small model and the text of the tests."""


def commands(path: Path) -> list[list[str]]:
    """Return the words of each command in the comments at the top of a run file."""
    return [shlex.split(line) for line in re.findall(r"^#   (.*)$", path.read_text(encoding="utf-8"), flags=re.M)]


@pytest.fixture
def verb(capsys, monkeypatch):
    """``verb(*words)`` runs pst-ds and returns its JSON."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(*words):
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def _pairs(folder: Path) -> dict[str, str]:
    """Local files in the shape of MRPC."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[:60]]
    lines = [
        json.dumps({
            "sentence1": row["text"], "sentence2": other["text"],
            "label": "equivalent" if row["label"] == other["label"] else "not_equivalent",
        })
        for row, other in zip(rows, rows[7:], strict=False)
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return {"data.dataset": ""} | {
        f"data.{split}": f"{folder}/pairs.jsonl" for split in ("train", "validation", "test")
    }


def test_there_are_examples_and_each_is_tested():
    assert {path.stem for path in EXAMPLES} == set(TINY)


@pytest.mark.parametrize(
    "words", [words for path in EXAMPLES for words in commands(path)], ids=lambda words: " ".join(words)[:70]
)
def test_its_commands_parse(words):
    PARSERS[words[0]](words[1:])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_says_how_to_start_it_and_where_it_writes(path):
    run = load_run(path)
    words = [word for command in commands(path) for word in command]
    assert str(path) in words
    assert run.output_dir in words or "launch/slurm.sbatch" in words


@pytest.mark.few(2)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_on_a_tiny_model_it_ends_in_the_zeros_that_it_asks_for(path, verb, tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "train.num_steps": 4, "train.num_epochs": 0.0,
                "deepspeed_config": "", "checkpoint.interval": 0, **TINY[path.stem]}  # fmt: skip
    if path.stem == "glue_pairs":
        settings |= _pairs(tmp_path)
    one_shot = next((words for words in commands(path) if words[:2] == ["pst-ds", "prune"]), None)
    if one_shot:
        settings["model.path"] = str(tmp_path / "start")
        words = one_shot[1 : one_shot.index("--out")]
        few = {**settings, **LLAMA, **TINY[path.stem]}
        verb(*words, "--out", tmp_path / "start", "--samples", 8, *_set(few))
    planned = verb("plan", path, *_set(settings))
    trained = verb("train", path, "--quiet", *_set(settings))
    exported = verb("export", tmp_path / "run", "--out", tmp_path / "export")
    assert planned["trained_parameters"] == trained["trained_parameters"]
    assert exported["sparsity_measured"] == pytest.approx(load_run(path).schedule.final_sparsity, abs=0.01)


def _set(settings: dict[str, object]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
