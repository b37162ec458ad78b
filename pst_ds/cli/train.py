"""``pst-ds train RUN.toml``"""

from __future__ import annotations

import argparse
from typing import Any

from pst_ds.cli.main import add_run_arguments, load_run_or_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "run file (TOML)")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = load_run_or_folder(args)
    from pst_ds.parallel.launch import launch_environment
    from pst_ds.train.run import prepare, train_run

    prepared = prepare(config, launch_environment(), run_file=args.run)
    result = train_run(prepared, quiet=args.quiet)
    if prepared.launch.rank == 0:
        print(f"run folder: {config.output_dir} (checkpoints/, metrics.jsonl, result.json, tensorboard/)")
    return {**result, "output_dir": config.output_dir}
