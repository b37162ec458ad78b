"""Refuse an export for what its settings, its place and the configs of run and model say: before weights are read,
data is tokenised or anything is written."""

from pathlib import Path

from torch import nn

from pst_ds.config.run import RunConfig
from pst_ds.core.packings import GGUF, ONNX, PACKINGS
from pst_ds.core.patterns import parse_pattern
from pst_ds.errors import InputError
from pst_ds.inference.onnx.folder import require_free as require_free_for_onnx
from pst_ds.inference.onnx.folder import require_graph
from pst_ds.writing.gguf.model import require_gguf
from pst_ds.writing.to_folder import require_free

_MOST_OF_TWO_OF_FOUR = 0.5
"""Share of the weights that "2:4" can hold."""


def require_place(out: Path, format_name: str, source: Path | None = None) -> None:
    """Raise InputError unless ``out`` can be written, and is another place than the folder ``source``."""
    if source is not None and out.resolve() == source.resolve():
        raise InputError(f"out = {str(out)!r} is the folder to read. Name another folder")
    if format_name == ONNX:
        require_free_for_onnx(out)
    else:
        require_free(out, format_name)


def require_vocabulary(path: str | None, seen: str) -> None:
    """Raise InputError unless ``path``, the setting ``vocabulary``, is None, ``seen`` or a file."""
    if path and path != seen and (not Path(path).exists() or Path(path).is_dir()):
        raise InputError(
            f"vocabulary = {path!r} cannot be read: no such file (looked in {Path(path).absolute()}). Name a UTF-8 "
            f'file with one text per line, or vocabulary = "{seen}"'
        )


def require_pruned(run: RunConfig, format_name: str, *, plain: bool) -> None:
    """Raise InputError for a packed format if the run prunes nothing, or keeps too many weights for "2:4"."""
    packing = "bitmask" if format_name == ONNX and not plain else format_name
    if packing not in PACKINGS:
        return
    if run.mask_method.masks == "none":
        fix = "Set plain = true" if format_name == ONNX else 'Choose format = "dense"'
        raise InputError(
            f'format = "{format_name}" omits pruned weights, and method = "{run.method}" of the run prunes none. {fix}'
        )
    pattern = parse_pattern(run.pst.pattern)
    is_known = not (pattern.pools_matrices or run.pst.overrides or pattern.kind == "experts")
    sparsity = run.schedule.final_sparsity if pattern.fixed_sparsity is None else pattern.fixed_sparsity
    if packing == "2:4" and is_known and run.pst.initial_mask != "zeros" and 1 - sparsity > _MOST_OF_TWO_OF_FOUR:
        raise InputError(
            f'format = "2:4" holds at most two of four weights, and the run, with pattern {pattern} and sparsity '
            f'{sparsity}, keeps more. Choose format = "bitmask", or train with pst.pattern = "2:4"'
        )


def require_representable(model: nn.Module, format_name: str) -> None:
    """Raise InputError for a ``model``, which may be on the meta device, that the format cannot represent."""
    if format_name == GGUF:
        require_gguf(model)
    if format_name == ONNX:
        require_graph(model)
