"""Every command in the documents parses: by pst-ds, by the launcher that it starts with, or by its script."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Callable

import pytest

from pst_ds.cli.main import build_parser

from .pages import PAGES, ROOT, all_blocks, commands, settings

COMMANDS = [(str(block), words) for block in all_blocks("bash") for words in commands(block)]
KNOWN_ELSEWHERE = ("cd", "git", "kubectl", "lm_eval", "podman", "scancel", "source", "tensorboard")
WORDS_BEFORE_THE_RUN = {
    "launch/local.sh": 2, "launch/elastic.sh": 6, "launch/slurm_array.sbatch": 1, "launch/slurm_elastic.sbatch": 1,
}  # fmt: skip


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=[f"{at} {' '.join(w)}" for at, w in COMMANDS])
def test_a_command_parses(words):
    program, *arguments = words
    if program.startswith("launch/"):
        _launch_script(program, arguments)
    elif program not in KNOWN_ELSEWHERE:
        assert program in PARSERS, f"no parser for {program}: give it one here"
        PARSERS[program](arguments)
    for path in words:
        if re.match(r"(tests|tools|launch|ds_configs|docs)/[\w/.-]+$", path):
            assert (ROOT / path).exists(), path


def _pst_ds(arguments: list[str]) -> None:
    verb = next(word for word in arguments if not word.startswith("-"))
    parsed = build_parser(verb).parse_args(arguments)
    for setting in getattr(parsed, "set", []):
        assert setting.partition("=")[0] in settings(), setting


def _launch_script(script: str, arguments: list[str]) -> None:
    assert (ROOT / script).is_file(), script
    first = {"launch/local.sh": "--ranks", "launch/elastic.sh": "--hosts"}.get(script)
    assert first in (None, arguments[0]), f"{script} wants {first} first"
    _pst_ds(["train", *arguments[WORDS_BEFORE_THE_RUN.get(script, 0) :]])


def _sbatch(arguments: list[str]) -> None:
    script = next(word for word in arguments if not word.startswith("-"))
    _launch_script(script, arguments[arguments.index(script) + 1 :])


def _module_or_script(program: str, arguments: list[str]) -> None:
    """What a launcher starts: pst-ds, or one of our scripts."""
    if program == "pst_ds":
        _pst_ds(arguments)
    else:
        _script([program, *arguments])


def _deepspeed(arguments: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(arguments)
    assert parsed.module == (parsed.user_script == "pst_ds")
    _module_or_script(parsed.user_script, parsed.user_args)


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module == (parsed.training_script == "pst_ds")
    _module_or_script(parsed.training_script, parsed.training_script_args)


def _accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    parsed = launch_command_parser().parse_args(arguments[1:])
    _module_or_script(parsed.training_script, parsed.training_script_args)


def _script(arguments: list[str]) -> None:
    """A script or module of ours knows the options it is given: its source has them in quotes."""
    name, *rest = arguments
    if name == "-c":
        compile(rest[0], "-c", "exec")
        return
    if name == "-m":
        module, *rest = rest
        name = module.replace(".", "/")
        name += "/__main__.py" if (ROOT / name).is_dir() else ".py"
    source = (ROOT / name).read_text(encoding="utf-8")
    if "import convert" in source:  # it hands its options on
        _pst_ds(["export", rest[0], "--out", *rest[1:]])
        return
    for option in (word for word in rest if word.startswith("--")):
        assert f'"{option}"' in source, f"{name} has no {option}"


def _make(arguments: list[str]) -> None:
    known = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert known.returncode == 0, known.stderr


def _pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"pst-ds\[([\w-]+)\]", " ".join(arguments)):
        assert extra in project["optional-dependencies"]


PARSERS: dict[str, Callable[[list[str]], None]] = {
    "accelerate": _accelerate,
    "deepspeed": _deepspeed,
    "make": _make,
    "pip": _pip,
    "pst-ds": _pst_ds,
    "python": _script,
    "sbatch": _sbatch,
    "torchrun": _torchrun,
}


def test_there_are_commands_to_parse():
    assert len(COMMANDS) > 60
    assert {words[0] for _, words in COMMANDS} >= {"pst-ds", "sbatch", "deepspeed", "torchrun", "accelerate", "make"}


def test_every_verb_is_in_the_command_line_page():
    from pst_ds.cli.main import VERBS

    page = PAGES["docs/reference/command-line.md"]
    assert not [verb for verb in VERBS if f"| `{verb}` |" not in page]
