"""``pst-ds tune RUN.toml``: search a run's learning rates in a share of its steps."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from pst_ds.atomic_files import require_writable, write_text_atomic
from pst_ds.cli.main import add_quiet_argument, add_run_arguments, number
from pst_ds.config.run import ConfigError
from pst_ds.config.toml import load_run
from pst_ds.errors import InputError
from pst_ds.parallel import stop_signals
from pst_ds.text_table import aligned

_share = number("a share above 0 and up to 1", float, lambda value: 0.0 < value <= 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_run_arguments(parser, "run file (TOML); its output_dir gets the trials")
    add(
        "--budget", type=_share, default=0.2, metavar="S", help="share of the run's steps for the trials (default: 0.2)"
    )
    add("--out", metavar="FILE", help="run file to write (default: RUN.tuned.toml, in the folder of RUN.toml)")
    add("--force", action="store_true", help="write over an existing file")
    add("--restart", action="store_true", help="start over, and forget the trials in output_dir")
    add_quiet_argument(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    stop_signals.install()
    config = load_run(args.run, args.set)
    out = Path(args.out) if args.out else Path(args.run).with_suffix(".tuned.toml")
    if not config.data.validation:
        raise ConfigError(
            "data.validation is missing: the trials are compared on it; name a validation file or split, or a part of "
            'the training file: data.train = "a.csv[:90%]", data.validation = "a.csv[90%:]"'
        )
    if out.exists() and not args.force:
        raise InputError(f"--out {str(out)!r} exists; --force writes over it, or name another file")
    require_writable(out, f"--out {str(out)!r}")
    from pst_ds.parallel.launch import launch_environment
    from pst_ds.train.run import prepare
    from pst_ds.train.tune.halving import RATES
    from pst_ds.train.tune.report import budget_text, trial_table, tuned_text, why
    from pst_ds.train.tune.trials import search

    context = prepare(config, launch_environment(), run_file=args.run)
    lines = search(context, args.budget, restart=args.restart)
    rates = {name: lines[-1][name] for name in RATES}
    tuned = replace(config, train=replace(config.train, **rates))
    if context.launch.rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(out, tuned_text(Path(args.run).read_text(encoding="utf-8-sig"), tuned, rates, why(lines)))
        print("\n".join([*aligned(trial_table(lines)), "", why(lines), f"wrote {out}: pst-ds train {out}"]))
    trials = [{k: v for k, v in line.items() if k != "event"} for line in lines[1:-1]]
    return {"out": str(out), "chosen": rates, "trials": trials, "budget": budget_text(lines)}
