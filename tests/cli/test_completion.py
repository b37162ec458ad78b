"""Shell completion: bash presses Tab for real; fish and zsh where they are installed."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import subprocess
import termios
from pathlib import Path

import pytest

from pst_ds.cli.completion import SHELLS, completion_script
from pst_ds.cli.main import VERBS, build_parser, main

ROOT = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="needs bash")
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
TEST = "tests/cli/test_completion.py"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(completion_script(shell))
    return folder


def _complete(script, *words):
    """What bash offers for the last of ``words``."""
    code = """
    source "$1"; shift
    COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); _shtab_pst_ds
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    command = [BASH, "--norc", "--noprofile", "-c", code, "bash", str(script), "pst-ds", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
    assert done.stderr == ""
    return done.stdout.split()


@needs_bash
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ([""], list(VERBS)),
        (["ver"], ["verify"]),
        (["export", "--form"], ["--format"]),
        (["export", "--format", ""], ["dense", "bitmask", "2:4", "csr", "compressed-tensors", "gguf", "onnx"]),
        (["prune", "--method", "s"], ["sparsegpt"]),
        (["prune", "--sw"], ["--swaps"]),
        (["prune", "--rec"], ["--reconstruct"]),
        (["prune", "--budgets", ""], ["equal", "owl", "saliency"]),
        (["init", "--task", "c"], ["classification", "causal-lm", "chat"]),
        (["train", "tests/data/cau"], ["tests/data/causal_lm.toml"]),
        (["inspect", "tests/data/tiny-"], ["tests/data/tiny-bert", "tests/data/tiny-llama"]),
        (["generate", "tests/data/ti"], ["tests/data/tiny-bert", "tests/data/tiny-llama"]),  # folders alone
        (["export", "x", "--out", "tests/da"], ["tests/data"]),
        (["completion", ""], list(SHELLS)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bash_offers(scripts, words, offered):
    assert sorted(_complete(scripts / "bash", *words)) == sorted(offered)


@needs_bash
@pytest.mark.parametrize("verb", VERBS)
def test_bash_offers_every_option_of_every_verb(scripts, verb):
    parser = build_parser(verb)
    (of_verb,) = (action.choices[verb] for action in parser._actions if action.choices and verb in action.choices)
    options = {o for action in of_verb._actions for o in action.option_strings if o.startswith("--")}
    assert set(_complete(scripts / "bash", verb, "--")) == options
    assert "--json" in options


@needs_bash
def test_tab_completes_in_a_bash_that_someone_types_into(scripts):
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null", "HISTFILE": ""}
    bash = subprocess.Popen(
        [BASH, "--norc", "--noprofile", "-i"], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environ,
        cwd=ROOT, text=True, start_new_session=True,
    )  # fmt: skip
    os.write(ours, f"source {scripts / 'bash'}\n".encode())
    os.write(ours, b'pst-ds() { echo "GOT $*"; }\n')
    os.write(ours, b"pst-ds expo\ttests/data/tiny-b\t --form\tbitm\t\nexit\n")
    try:
        said, _ = bash.communicate(timeout=60)
    finally:
        bash.kill()
        os.close(theirs)
        os.close(ours)
    assert "GOT export tests/data/tiny-bert --format bitmask" in said.replace("tiny-bert/", "tiny-bert")


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_offers_verbs_and_choices(scripts):
    code = f'source {scripts / "fish"}; complete -C "pst-ds ver"; complete -C "pst-ds export --format b"'
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["verify", "bitmask"]


def test_a_colon_in_a_choice_is_no_separator_for_zsh(scripts):
    assert r"(dense bitmask 2\:4 csr compressed-tensors gguf onnx)" in (scripts / "zsh").read_text()


@needs_zsh
def test_zsh_reads_the_script(scripts):
    subprocess.run(["zsh", "-n", str(scripts / "zsh")], check=True, timeout=60)


@needs_zsh
@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("expo\ttests/data/tiny-b\t --form\tbitm\t", "export tests/data/tiny-bert --format bitmask"),
        ("export x --format 2\t", "export x --format 2:4"),
        (
            "report tests/cli/test_com\t tests/cli/test_comp\t tests/data/tiny-b\t",
            f"report {TEST} {TEST} tests/data/tiny-bert",
        ),
        (
            "report --export tests/data/tiny-b\t tests/data/tiny-l\t",
            "report --export tests/data/tiny-bert tests/data/tiny-llama",
        ),
        ("bench tests/data/tiny-b\t --thr\t 1 2", "bench tests/data/tiny-bert --threads 1 2"),
    ],
    ids=lambda value: value.replace("\t", "") if "\t" in value else "",
)
def test_tab_completes_in_a_zsh_that_someone_types_into(scripts, typed, words):
    ours, theirs = pty.openpty()
    environ = {**os.environ, "TERM": "dumb", "HISTFILE": ""}
    zsh = subprocess.Popen(
        ["zsh", "-f", "-i"], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environ, cwd=ROOT, text=True,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.write(ours, b"autoload -U compinit; compinit -D -u\n")
    os.write(ours, f'eval "$(<{scripts / "zsh"})"\n'.encode())
    os.write(ours, b'pst-ds() { echo "GOT $*"; }\n')
    os.write(ours, f"pst-ds {typed}\nexit\n".encode())
    try:
        said, _ = zsh.communicate(timeout=60)
    finally:
        zsh.kill()
        os.close(theirs)
        os.close(ours)
    assert f"GOT {words}\n" in said.replace("/ ", " ").replace("/\n", "\n")


def test_the_verb_prints_the_script(capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == completion_script("bash") + "\n"
    assert main(["completion", "fish"]) == 0
    assert "complete -c pst-ds" in capsys.readouterr().out
