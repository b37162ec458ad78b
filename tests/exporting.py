"""Exports with the storage options as keywords, and the bits in their files."""

import zlib
from pathlib import Path

import numpy as np

from pst_ds.writing import to_folder
from pst_ds.writing.to_folder import ExportOptions

_NOT_STORAGE = ("tokenizer", "vocabulary", "run")


def _split(keywords):
    others = {name: keywords.pop(name) for name in _NOT_STORAGE if name in keywords}
    return ExportOptions(**keywords), others


def export_folder(source: Path, out: Path, **keywords):
    options, others = _split(keywords)
    return to_folder.export_folder(source, out, options, **others)


def export_checkpoint(model, checkpoint, tokenizer, out: Path, **keywords):
    options, others = _split(keywords)
    return to_folder.export_checkpoint(model, checkpoint, tokenizer, out, options, **others)


def row_bits_by_numpy(stored, rows: int) -> np.ndarray:
    """Return a part "bitmask", compressed or not, as (rows, bytes) uint8."""
    return (
        stored.numpy()
        if stored.dim() == 2
        else np.frombuffer(zlib.decompress(stored.numpy()), np.uint8).reshape(rows, -1)
    )
