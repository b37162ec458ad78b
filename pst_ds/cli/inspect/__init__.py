"""``pst-ds inspect PATH``: describe a folder or file from headers and masks, without building a model."""

import argparse
from pathlib import Path

from pst_ds.cli.inspect.layers import Inspection, print_inspection
from pst_ds.errors import InputError, shortened
from pst_ds.storage_format import format_recognising


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``pst-ds inspect``."""
    kinds = "run file, run folder, checkpoint, export, model folder, name of a model on the hub, or token store"
    parser.add_argument("path", metavar="PATH", help=kinds)
    parser.add_argument("--layers", action="store_true", help="one line per layer, instead of one for all blocks")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Print the description of ``args.path`` and return it as JSON values. Raises InputError."""
    path = Path(args.path)
    # without a slash it is more likely a typing error than one of the hub's oldest models
    if "/" in args.path and not path.exists():
        # imported here because it imports torch, which a run file on disk does not need
        from pst_ds.nn.base_model import Pretrained

        path = Pretrained(args.path).download()
    inspection = inspect(path)
    print_inspection(inspection, every_layer=args.layers)
    return {"path": args.path, "kind": inspection.kind, **inspection.facts, "layers": inspection.layers}


def inspect(path: Path) -> Inspection:
    """Inspect a file or folder. Raises InputError if it is missing, damaged or of an unknown kind."""
    # they import torch, which the parser of the command line must not
    from pst_ds.cli.inspect import models, runs

    if not path.exists():
        raise InputError(f"{str(path)!r} does not exist (looked in {path.absolute()})")
    # first, because a GGUF file is not a run file, and an ONNX export contains some of the files below
    storage = format_recognising(path)
    if storage is not None and (hint := storage.inspection_hint(path)):
        raise InputError(hint)
    if path.suffix == ".safetensors" and path.is_file():
        raise InputError(
            f"{path} is a weight file, and only folders are described. Name its folder: pst-ds inspect {path.parent}"
        )
    if path.is_file():
        return runs.run_file(path)
    # The order matters where a folder has several of these files: an export and a pruned model are model folders, too.
    # SHA256SUMS and manifest.json are both a checkpoint's, so that one that has lost either is reported as damaged.
    readers = {
        "run.toml": runs.run_folder,
        "SHA256SUMS": runs.checkpoint_folder,
        "documents.bin": models.token_store,
        "manifest.json": runs.checkpoint_folder,
        "pst_manifest.json": models.export_folder,
        "pruning.json": models.pruned_folder,
        "config.json": models.model_folder,
    }
    for name, reader in readers.items():
        if (path / name).exists():
            return reader(path)
    names = sorted(file.name for file in path.iterdir())
    content = f"It contains {shortened(names, 6)}" if names else "It is empty"
    raise InputError(
        f"{str(path)!r} is not a run, checkpoint, export, model or token store: it does not contain any of "
        f"{', '.join(readers)}. {content}"
    )
