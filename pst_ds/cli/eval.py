"""``pst-ds eval RUN``: metrics of a checkpoint on one split."""

from __future__ import annotations

import argparse
from typing import Any

from pst_ds.cli.main import add_run_arguments, load_run_or_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "run folder, or its run file")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--checkpoint", default="best", help='"best" (default), "final", or another in checkpoints/')


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = load_run_or_folder(args)
    from pst_ds.parallel.launch import launch_environment
    from pst_ds.train.run import build, evaluate, prepare
    from pst_ds.train.run_folder import open_checkpoint

    checkpoint = open_checkpoint(config, args.checkpoint)
    prepared = prepare(config, launch_environment(), run_file=args.run, labels=checkpoint.state.labels)
    examples = prepared.load(args.split)
    _, engine = build(prepared, checkpoint)
    metrics = evaluate(engine, examples, prepared)
    if prepared.launch.rank == 0:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(f"{checkpoint.folder} on {args.split} ({len(examples)} {prepared.task.unit}): {shown}")
    return {"checkpoint": str(checkpoint.folder), "split": args.split, "examples": len(examples), **metrics}
