"""Refuse an export for what its settings, its place and the configs of run and model say: before weights are read,
data is tokenised or anything is written."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from pst_ds.config.run import RunConfig
from pst_ds.core.packings import GGUF, ONNX, PACKINGS
from pst_ds.core.patterns import parse_pattern
from pst_ds.errors import InputError
from pst_ds.inference.onnx.folder import require_free as require_free_for_onnx
from pst_ds.inference.onnx.folder import require_graph
from pst_ds.writing.gguf.model import require_gguf
from pst_ds.writing.to_folder import require_free

if TYPE_CHECKING:
    from pst_ds.export.export_run import ExportSettings

_MOST_OF_TWO_OF_FOUR = 0.5
"""Share of the weights that "2:4" can hold."""


def require_place(out: Path, settings: "ExportSettings", source: Path | None = None) -> None:
    """Raise InputError unless ``out`` can be written, and is another place than the folder ``source``."""
    if source is not None and out.resolve() == source.resolve():
        raise InputError(f"out = {str(out)!r} is the folder to read. Name another folder")
    if settings.format == ONNX:
        require_free_for_onnx(out)
    else:
        require_free(out, settings.format)


def require_vocabulary(settings: "ExportSettings", seen: str) -> None:
    """Raise InputError unless ``vocabulary`` is ``seen`` or a file."""
    path = settings.vocabulary
    if path and path != seen and not Path(path).is_file():
        raise InputError(
            f"vocabulary = {path!r} is not a file (looked in {Path(path).absolute()}). Name a UTF-8 file with one text "
            f'per line, or vocabulary = "{seen}"'
        )


def require_pruned(run: RunConfig, settings: "ExportSettings") -> None:
    """Raise InputError for a format of pruned weights if the run prunes nothing, or surely too little for "2:4"."""
    packing = "bitmask" if settings.format == ONNX and not settings.plain else settings.format
    if packing not in PACKINGS:
        return
    if run.mask_method.masks == "none":
        fix = "Set plain = true" if settings.format == ONNX else 'Choose format = "dense"'
        raise InputError(
            f'format = "{settings.format}" omits pruned weights, and method = "{run.method}" of the run prunes '
            f"none. {fix}"
        )
    pattern = parse_pattern(run.pst.pattern)
    is_known = not (pattern.pools_matrices or run.pst.overrides or pattern.kind == "experts")
    sparsity = run.schedule.final_sparsity if pattern.fixed_sparsity is None else pattern.fixed_sparsity
    if packing == "2:4" and is_known and run.pst.initial_mask != "zeros" and 1 - sparsity > _MOST_OF_TWO_OF_FOUR:
        raise InputError(
            f'format = "2:4" holds at most two of four weights, and the run, with pattern {pattern} and sparsity '
            f'{sparsity}, keeps more. Choose format = "bitmask", or train with pst.pattern = "2:4"'
        )


def require_representable(model: nn.Module, settings: "ExportSettings") -> None:
    """Raise InputError for a ``model``, which may be on the meta device, that the format cannot represent."""
    if settings.format == GGUF:
        require_gguf(model)
    if settings.format == ONNX:
        require_graph(model)
