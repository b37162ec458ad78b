"""``pst-ds launch RUN.toml --by LAUNCHER``: train a run through a launcher, and restart it after failures."""

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from pst_ds.cli.main import add_run_arguments, load_run_or_folder, number
from pst_ds.errors import InputError

_number = number("a whole number of at least 0", int, lambda value: value >= 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_run_arguments(parser, "run file (TOML), or a run folder to resume")
    by = "the launcher's command before RUN, such as 'launch/local.sh --ranks 2' (default: pst-ds train)"
    add("--by", default="pst-ds train", metavar="COMMAND", help=by)
    add("--retries", type=_number, default=10, metavar="N", help="maximum restarts after failures (default: 10)")
    add("--wait", type=_number, default=10, metavar="S", help="seconds before a restart (default: 10)")
    add("--hostfile", default="", metavar="FILE", help="one host per line; {hostfile} in --by")
    add("--spares", type=_number, default=0, metavar="N", help="hosts held back to replace faulty ones (default: 0)")
    add("--check", default="", metavar="COMMAND", help="exits with 0 on a healthy {host}; runs before every start")


def run(args: argparse.Namespace) -> dict[str, object]:
    config = load_run_or_folder(args)
    from pst_ds.supervise.hosts import read_hosts
    from pst_ds.supervise.supervisor import Supervisor

    launcher = _words(args.by)
    hosts = read_hosts(args.hostfile, args.spares, args.check, launcher)
    settings = [word for setting in args.set for word in ("--set", setting)]
    supervisor = Supervisor(
        launcher, [args.run, "--resume", *settings], Path(config.output_dir), hosts, args.retries, args.wait, _say
    )
    try:
        code = supervisor.run()
    except OSError as error:
        raise InputError(f"--by {args.by!r} cannot be started: {error}. Name a program on PATH") from None
    attempts = [asdict(attempt) for attempt in supervisor.attempts]
    return {"exit_code": code, "attempts": attempts, "left_out": hosts.left_out, "output_dir": config.output_dir}


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--by {command!r} is not a command: {error}") from None
    if not words:
        raise InputError("--by is empty. Name a launcher, such as 'launch/local.sh --ranks 2'")
    return words


def _say(text: str) -> None:
    print(f"pst-ds launch: {text}", file=sys.stderr, flush=True)
