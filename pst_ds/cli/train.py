"""``pst-ds train RUN.toml``: train a run."""

import argparse
import gc
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from pst_ds.cli.flags import flags_of_fields
from pst_ds.cli.main import add_quiet_argument, add_run_arguments, load_run_or_folder
from pst_ds.parallel import stop_signals
from pst_ds.progress import is_first_rank

FLAGS = flags_of_fields(["resume", "restart"])
"""Flags for the settings that messages of this verb name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "run file (TOML), or a run folder to resume")
    begin = parser.add_mutually_exclusive_group()
    resume = "resume from the newest valid checkpoint of the run, if there is one"
    begin.add_argument("--resume", action="store_true", help=resume)
    restart = "start over in a folder with checkpoints, which are set aside"
    begin.add_argument("--restart", action="store_true", help=restart)
    add_quiet_argument(parser)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Collect no garbage in the block: imports make a million objects that stay, and looking at them takes a second."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def run(args: argparse.Namespace) -> dict[str, object]:
    # before the slow imports: a scheduler may send its signal at any time
    stop_signals.install()
    config = load_run_or_folder(args)
    with _without_garbage_collection():
        from pst_ds.train.run import train_run

    result = train_run(config, resume=args.resume, restart=args.restart, quiet=args.quiet, run_file=args.run)
    if is_first_rank():
        print(f"run folder: {config.output_dir} (checkpoints/, metrics.jsonl, result.json, tensorboard/)")
        run = shlex.quote(config.output_dir)
        out = shlex.quote(f"{config.output_dir}/cpu")
        # a language model answers at once; of a classifier the accuracy after the export is what counts
        verb = "serve" if config.task_facts.predicts_tokens else "verify"
        print(f"next: pst-ds export {run} --for cpu --out {out}; then pst-ds {verb} {out}")
    return {**result, "output_dir": config.output_dir}
