"""Messages name settings as Python does; a verb shows its flags for them."""

from __future__ import annotations

import argparse
import ast
import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pst_ds.cli import bench, eval, export, generate, plan, predict, prepare, prune, train, users, verify
from pst_ds.cli.flags import in_flags
from pst_ds.cli.main import VERBS, build_parser, main
from pst_ds.config.one_shot import PruneConfig
from pst_ds.config.settings import ConfigError
from pst_ds.config.targets import TARGETS
from pst_ds.export.export_run import ExportSettings
from pst_ds.storage_format import listed_formats

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"bits": "--bits", "keep_zeros": "--keep-zeros", "data.label_column": "--label-column", "names": "--names"}


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("bits = 8 is wrong. Set bits = 4.", "--bits 8 is wrong. Set --bits 4."),
        ("keep_zeros = true, two bits", "--keep-zeros, two bits"),
        ('Set bits = "4" or "8", or none', "Set --bits 4 or 8, or none"),
        ("column data.label_column holds 2", "column --label-column holds 2"),
        ("data.label_column = 'my label': no", "--label-column 'my label': no"),
        ("names = ['a', 'b'] and pst.bits = 3", "--names a,b and pst.bits = 3"),
        ("embedding_bits = 8", "embedding_bits = 8"),
    ],
)
def test_settings_become_flags_and_other_words_stay(message, wanted):
    assert in_flags(message, FLAGS) == wanted
    assert in_flags(message, {}) == message


def _actions(verb):
    (verbs,) = (action.choices for action in build_parser(verb)._actions if action.choices)
    return {name: action for action in verbs[verb]._actions for name in action.option_strings}


@pytest.mark.parametrize("verb", [bench, eval, export, generate, plan, predict, prepare, prune, train, users, verify])
def test_every_flag_of_the_table_is_an_option_of_the_verb(verb):
    assert set(verb.FLAGS.values()) <= set(_all_options(build_parser(verb.__name__.rpartition(".")[2])))


def test_the_help_lists_every_format_and_method_and_targets_agree(capsys):
    wanted = list(listed_formats())
    assert wanted == ["dense", "bitmask", "2:4", "csr", "compressed-tensors", "gguf", "onnx"]
    assert wanted == list(_actions("export")["--format"].choices)
    with pytest.raises(ConfigError, match=", ".join(map(repr, wanted))):
        ExportSettings(format="zip")
    assert list(prune.PRUNING_METHODS) == list(get_args(get_type_hints(PruneConfig)["method"]))
    assert _actions("export")["--for"].choices == _actions("init")["--target"].choices == tuple(TARGETS)
    for verb, names in (("export", wanted), ("prune", prune.PRUNING_METHODS)):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        text = "".join(capsys.readouterr().out.split())  # lines break anywhere
        assert all(f"{name}:" in text for name in names)


def _refused(capsys, *words):
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_init_answers_in_its_own_flags(tmp_path, capsys):
    rows = [{"text": "a film", "label": 0.5}, {"text": "the plot", "label": 1.5}]
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text("".join(json.dumps(row) + "\n" for row in rows * 9))
    more = ("--out", str(tmp_path / "run.toml"))
    bert = ("init", "tests/data/tiny-bert", "--train")
    said = _refused(capsys, *bert, str(numbers), "--task", "classification", *more)
    assert said.endswith("Set --task regression\n")
    said = _refused(capsys, *bert, "tests/data/train.jsonl", "--sparsity", "90", *more)
    assert "--sparsity 90.0 must be in [0, 1). Did you mean 0.9?" in said
    said = _refused(capsys, *bert, "tests/data/train.jsonl", "--task", "chat", *more)
    assert "is an encoder" in said
    said = _refused(capsys, *bert, "tests/data/train.jsonl", "--pattern", "2:4", "--target", "vllm", *more)
    assert "--pattern 2:4 with --target vllm: vLLM computes with dense weights" in said
    said = _refused(capsys, *bert, "tests/data/train.jsonl", "--target", "llama.cpp", *more)
    assert "--target llama.cpp runs language models" in said
    assert not (tmp_path / "run.toml").exists()


@pytest.mark.parametrize("settings", [{"method": "wanda", "bits": 8}, {"method": "sparsegpt", "keep_zeros": True}])
def test_prune_says_in_flags_what_python_says_in_fields(tmp_path, capsys, settings):
    with pytest.raises(ValueError, match=r"(bits|keep_zeros) = ") as caught:
        PruneConfig(**settings)
    assert "--" not in str(caught.value)
    flags = [word for name, value in settings.items() for word in (prune.FLAGS[name], str(value)) if word != "True"]
    said = _refused(capsys, "prune", "tests/data/causal_lm.toml", "--out", str(tmp_path / "out"), *flags)
    assert said.startswith("pst-ds prune: --")
    assert " = " not in said


@pytest.mark.parametrize("target", ["vllm", "transformers"])
def test_an_engine_that_does_not_skip_pruned_weights_says_so(folders, tmp_path, capsys, target):
    words = ["export", str(folders / "pruned"), "--for", target, "--out", str(tmp_path / "out"), "--quiet", "--json"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert f"note: {TARGETS[target].title} computes with dense weights: a sparsity of 0.5" in said.err
    assert json.loads(said.out.splitlines()[-1])["note"] in said.err


PYTHON_PACKAGES = (
    *(
        "core",
        "data",
        "export",
        "formats",
        "hf",
        "inference",
        "masks",
        "nn",
        "planning",
        "prune",
        "runtime",
        "train",
        "writing",
    ),
)
"""Packages whose messages are for callers in Python, too."""
COMMAND = re.compile(r"pst-ds [a-z]+(?: (?!--)[\w/{}.-]+)*(?: --[a-z-]+(?: [\w:{}/]+)?)*")
"""A command that the user is told to run."""


def _texts_of_messages(tree):
    """The strings of the source that are not docstrings; each join of strings is one, with {} for its values."""
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (prose | parts):
            yield node.value


def test_messages_of_python_name_fields_and_not_flags():
    options = {option for verb in VERBS for option in _all_options(build_parser(verb))}
    sources = [path for package in PYTHON_PACKAGES for path in sorted((ROOT / "pst_ds" / package).rglob("*.py"))]
    assert len(sources) > 100
    found = [
        (str(path.relative_to(ROOT)), text)
        for path in sources
        for text in _texts_of_messages(ast.parse(path.read_text(encoding="utf-8")))
        if " " in text  # other strings are arguments of a program
        and set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", COMMAND.sub("", text))) & options
    ]
    assert not found


def _all_options(parser):
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))
        for sub in (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from _all_options(sub)
