"""``pst-ds export RUN --out DIR``"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from pst_ds.cli.main import add_run_arguments, load_run_or_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "run folder, or its run file")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--format", choices=("dense",), default="dense", help="dense: zeros in a plain model folder")
    parser.add_argument("--checkpoint", default="best", help='"best" (default), "final", or another in checkpoints/')
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="cast every tensor; default: the base model's")


def run(args: argparse.Namespace) -> dict[str, Any]:
    config = load_run_or_folder(args)
    from pst_ds.export.dense import export_dense
    from pst_ds.train.model import load_tokenizer, meta_model
    from pst_ds.train.run_folder import open_checkpoint

    checkpoint = open_checkpoint(config, args.checkpoint)
    tokenizer = load_tokenizer(config)
    without_override = replace(config, model=replace(config.model, dropout=None))
    model = meta_model(without_override, checkpoint.state.labels, tokenizer)
    written = export_dense(model, checkpoint, tokenizer, Path(args.out), dtype=args.dtype)
    print(
        f"wrote {args.out}: {written['pruned_tensors']} pruned tensors of {written['tensors']}, sparsity "
        f"{written['sparsity_counted']:.6f} counted, {written['sparsity_asked']} asked"
    )
    return {**written, "checkpoint": str(checkpoint.folder)}
