"""``pst-ds inspect PATH``: what a folder or file is and holds, from headers, manifests and masks; no model is built."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_ds.errors import InputError

if TYPE_CHECKING:
    from pst_ds.cli.inspect.text import Inspected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="run file, run folder, checkpoint, small state, export, or model folder"
    )
    parser.add_argument("--layers", action="store_true", help="a line for every layer; else one for its like in blocks")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from pst_ds.cli.inspect.text import print_inspected

    found = inspected(Path(args.path))
    print_inspected(found, every_layer=args.layers)
    return {"path": args.path, "kind": found.kind, **found.facts, "layers": found.layers}


def inspected(path: Path) -> Inspected:
    """What ``path`` is and holds. Raises InputError for what is not there, is damaged or is none of these."""
    from pst_ds.cli.inspect import models as inspect_models
    from pst_ds.cli.inspect import runs as inspect_runs
    from pst_ds.cli.inspect import trained as inspect_trained

    if not path.exists():
        raise InputError(f"{str(path)!r} does not exist (looked in {path.absolute()})")
    if path.is_file():
        return inspect_runs.run_file(path)
    readers = {
        "run.toml": inspect_runs.run_folder,
        "SHA256SUMS": inspect_runs.checkpoint_folder,
        "manifest.json": inspect_runs.checkpoint_folder,
        "pst_config.json": inspect_trained.small_state,
        "pst_manifest.json": inspect_models.export_folder,
        "pruning.json": inspect_models.pruned_folder,
        "config.json": inspect_models.model_folder,
    }
    for name, reader in readers.items():
        if (path / name).exists():
            return reader(path)
    inside = sorted(p.name for p in path.iterdir())
    raise InputError(
        f"{str(path)!r} is no run, checkpoint, export or model: it has none of {', '.join(readers)}. "
        + (f"It holds {', '.join(inside[:6])}{', …' if len(inside) > 6 else ''}" if inside else "It is empty")
    )
