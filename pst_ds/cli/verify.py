"""``pst-ds verify DIR [--against RUN]``: an export against its manifest, and against the model that was trained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pst_ds.cli.main import load_run_or_folder


class VerificationError(RuntimeError):
    """The export is well-formed but is not the trained model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("export", help="export folder")
    parser.add_argument("--against", dest="run", metavar="RUN", help="run folder the export came from")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the run")
    parser.add_argument("--checkpoint", default="best", help="checkpoint that was exported (default: best)")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--limit", type=int, default=0, help="compare on the first N examples only")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pst_ds.export.manifest import check_export

    counts = check_export(Path(args.export))
    print(
        f"{args.export}: {counts['tensors']} tensors as in the manifest, sparsity {counts['sparsity_counted']:.6f} "
        f"counted in the file, {counts['sparsity_asked']} asked"
    )
    if args.run is None:
        return {**counts, "export_dir": args.export}
    compared = _compare(args)
    print(
        f"reloaded with plain transformers against the masked model on {compared['examples']} {compared['unit']} of "
        f"{args.split}: {compared['differing_weights']} of {compared['compared_weights']} weight tensors differ, "
        f"{compared['differing_predictions']} predictions differ, largest logit difference "
        f"{compared['max_logit_difference']:.3g}"
    )
    if compared["differing_predictions"] or compared["differing_weights"]:
        raise VerificationError(f"{args.export} is not the model in {args.run}, checkpoint {args.checkpoint}")
    return {**counts, **compared, "reloaded_equal": True, "export_dir": args.export}


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    """The masked training model and the export, rebuilt side by side, on the same batches."""
    config = load_run_or_folder(args)
    import torch

    from pst_ds.nn.embedding import pst_embeddings
    from pst_ds.nn.inject import pst_layers
    from pst_ds.train.evaluate import compare
    from pst_ds.train.model import DTYPES, attention_options
    from pst_ds.train.run import masked_model, prepare_single
    from pst_ds.train.run_folder import open_checkpoint

    checkpoint = open_checkpoint(config, args.checkpoint)
    prepared = prepare_single(config, checkpoint)
    examples = prepared.load(args.split)
    if args.limit:
        examples = examples.first(args.limit)
    masked = masked_model(prepared, checkpoint)
    plain = prepared.task.model_class().from_pretrained(
        args.export, dtype=DTYPES[config.train.precision], **attention_options(config)
    )
    plain = plain.to(prepared.device).eval()
    merged: dict[str, Any] = {f"{n}.weight": layer.masked_weight() for n, layer in pst_layers(masked).items()}
    merged |= {f"{n}.weight": embedding.updated_weight() for n, embedding in pst_embeddings(masked).items()}
    merged = merged or dict(masked.named_parameters())  # method "dense" changes no module
    loaded = dict(plain.named_parameters())
    differing = [n for n, weight in merged.items() if not torch.equal(weight, loaded[n])]
    differences, metrics = compare(
        masked, plain, prepared.task, examples, prepared.tokenizer, config.eval_batch_size, prepared.device
    )
    return {
        "examples": len(examples),
        "unit": prepared.task.unit,
        "compared_weights": len(merged),
        "differing_weights": len(differing),
        **differences,
        "metrics": metrics,
    }
