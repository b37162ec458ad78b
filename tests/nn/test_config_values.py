"""Impossible values of a config.json: one message with file, key and value, from every command that reads a model."""

import json
import shutil
from pathlib import Path

import pytest

from pst_ds.cli.main import main
from tests.pairs import every_pair

ROOT = Path(__file__).resolve().parents[2]
WRONG = {
    "hidden_act": "__import__",
    "vocab_size": -1,
    "num_hidden_layers": 10**9,
    "hidden_size": "32",
    "num_attention_heads": 0,
}
COMMANDS = {
    "inspect": ["inspect", "MODEL"],
    "export": ["export", "MODEL", "--out", "OUT"],
    "generate": ["generate", "MODEL", "--prompt", "the"],
    "init": ["init", "MODEL", "--train", "tests/data/train.jsonl", "--out", "OUT"],
    "prune": [
        "prune",
        "tests/data/causal_lm.toml",
        "--set",
        'model.path="MODEL"',
        "--method",
        "magnitude",
        "--out",
        "OUT",
    ],
    "plan": ["plan", "tests/data/causal_lm.toml", "--set", 'model.path="MODEL"'],
}


@every_pair
@pytest.mark.parametrize("key", WRONG)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_value_is_named_with_its_file_and_key(tmp_path, capsys, monkeypatch, command, key):
    monkeypatch.chdir(ROOT)
    model = Path(shutil.copytree(ROOT / "tests/data/tiny-llama", tmp_path / "model"))
    table = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**table, key: WRONG[key]}))
    places = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    words = [word.replace("MODEL", places["MODEL"]).replace("OUT", places["OUT"]) for word in COMMANDS[command]]
    assert main(words) == 2
    message = capsys.readouterr().err
    assert f"{model / 'config.json'}: {key} = " in message
    assert str(WRONG[key]) in message
