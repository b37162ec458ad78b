"""``pst-ds completion SHELL``: print a completion script with all verbs, options, choices and files; it runs no
Python.
"""

import argparse
from collections.abc import Iterator

from pst_ds.cli.main import VERBS, build_parser
from pst_ds.errors import InputError

SHELLS = {
    "bash": 'eval "$(pst-ds completion bash)"                                  # in ~/.bashrc',
    "zsh": 'pst-ds completion zsh > "${fpath[1]}/_pst-ds"                      # a folder of fpath, before compinit',
    "fish": "pst-ds completion fish > ~/.config/fish/completions/pst-ds.fish",
}
"""Installation of the script in each shell."""
_FILES, _FOLDERS = {"FILE", "RUN", "SRC", "PATH"}, {"DIR", "OUT", "EXPORT"}
"""Metavars of arguments that are files (or folders), and folders only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "for example:\n  " + "\n  ".join(SHELLS.values())
    parser.add_argument("shell", choices=tuple(SHELLS))


def run(args: argparse.Namespace) -> dict[str, str]:
    script = completion_script(args.shell)
    if not args.json:
        print(script)
    return {"shell": args.shell, "script": script}


def completion_script(shell: str) -> str:
    """Make the script for a shell. Raises InputError without shtab."""
    try:
        import shtab
    except ImportError:
        raise InputError("completion scripts are made by shtab, which is not installed: pip install shtab") from None
    parser = build_parser(*VERBS)
    for action in _actions(parser):
        name = str(action.metavar or action.dest).upper()
        if shell == "zsh" and isinstance(action.choices, tuple):
            action.choices = [str(choice).replace(":", r"\:") for choice in action.choices]  # its own separator
        if name in _FILES | _FOLDERS and not action.choices:
            action.complete = shtab.FILE if name in _FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    script = str(shtab.complete(parser, shell=shell))
    # shtab lets zsh complete one value of an argument with several; a star completes all
    return script.replace('"(*):', '"*:') if shell == "zsh" else script


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield every argument of ``parser`` and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for of_verb in action.choices.values():
                yield from _actions(of_verb)
