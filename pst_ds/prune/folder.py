"""Write a pruned model as a folder that plain transformers loads, with a pruning record."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from pst_ds.atomic_files import require_writable
from pst_ds.errors import InputError
from pst_ds.file_names import MANIFEST_FILE
from pst_ds.nn.folder_facts import PRUNING_RECORD
from pst_ds.prune.outcome import PrunedLayer

RECORD_FILE = PRUNING_RECORD
SCALES_FILE = "scales.safetensors"
"""Scales of a quantised folder: (O, groups) bf16 of each layer. The record names the quantisation."""
FORMAT = 1


def require_free(out: Path, base: str) -> None:
    """Raise InputError unless ``out`` is free, an empty folder, or an earlier result of ``pst-ds prune``."""
    if out.resolve() == Path(base).resolve():
        raise InputError(f"out = {str(out)!r} is the model to prune. Name another folder")
    is_ours = (out / RECORD_FILE).is_file() and not (out / MANIFEST_FILE).exists()
    if out.exists() and not (out.is_dir() and (is_ours or not any(out.iterdir()))):
        raise InputError(
            f"out = {str(out.absolute())!r} exists and was not written by pst-ds prune. Name another folder"
        )
    require_writable(out, f"out = {str(out)!r}")


def record_of(layers: Sequence[PrunedLayer], about: Mapping[str, object]) -> dict[str, object]:
    """Return the content of :data:`RECORD_FILE`: the facts ``about`` the run, totals, and facts of each layer."""
    weights = 0
    zeros = 0
    pruned = 0
    for layer in layers:
        weights += layer.shape[0] * layer.shape[1]
        zeros += layer.zeros
        pruned += layer.pruned
    return {
        "format": FORMAT,
        **about,
        "sparsity_measured": zeros / weights,
        "pruned_weights": pruned,
        "weights": weights,
        "layers": [_facts_of(layer) for layer in layers],
    }


def _facts_of(layer: PrunedLayer) -> dict[str, object]:
    """Return the facts of a layer for the record, with those of experts for a stack only."""
    facts: dict[str, object] = {}
    for field in fields(layer):
        value = getattr(layer, field.name)
        # Scales are tensors, and have a file: SCALES_FILE.
        is_of_record = field.name != "scales" and (value or not field.name.startswith("expert_"))
        if is_of_record:
            facts[field.name] = value
    return facts


def scales_name(layer: str) -> str:
    """Return the name of a layer's scales in :data:`SCALES_FILE`."""
    return f"{layer}.scales"
